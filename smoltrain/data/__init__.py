"""Data: from documents to the rows of each step.

    documents/ (listing, readers, retry)      which files a source has, how one is read, what is tried again
    tokenizers/                               text to token ids and back
    tokens/ (prepare, tokenise, token_files)  documents to token files: once, before the first step
    rows/ (row_source, streams, loader)       rows by position, out of token files or streams; the rows of a step
    order.py                                  which row is trained on when: integers only

One process calls `prepare_run_data`; then every rank calls `open_loader`. From then on the run lives on its own copies
of tokenizer and validation tokens, and in cached mode of all tokens.
"""
