"""What other trainers call the keys of a recipe: nanoGPT, transformers, litgpt, torchtitan, nanochat, Megatron, W&B.

Words that are keys here too (`seed`, `weight_decay`, `compile`) do not stand in the table: keys.py finds those first.
"""

# (words, answer). `{value}` is what was typed, in our words (VALUE_WORDS); `phases.*` becomes the phases of the recipe,
# and `model.KEY` becomes `model.config.KEY` where the model is one of transformers. An answer that begins with NO_KEY
# is about something that is not set by a key.
NO_KEY = "no key"
ALIAS_TABLE = (
    # --- model: LlamaConfig, GPT2Config, nanoGPT, litgpt, torchtitan
    ("n_layer n_layers num_layers layers depth", "model.num_hidden_layers={value}"),
    ("n_head n_heads num_heads num_attn_heads", "model.num_attention_heads={value}"),
    ("n_kv_head n_kv_heads num_kv_heads n_query_groups num_query_groups", "model.num_key_value_heads={value}"),
    ("n_embd n_embed d_model dim model_dim emb_dim embed_dim embedding_dim hidden_dim", "model.hidden_size={value}"),
    ("d_ff ffn_dim ffn_hidden_size mlp_dim n_inner", "model.intermediate_size={value}"),
    (
        "block_size context_length context_len context_window ctx_len n_ctx seq_len seq_length max_seq_len "
        "max_seq_length max_length",
        "batch.sequence_length={value} (and model.max_position_embeddings at least as long)",
    ),
    ("n_positions", "model.max_position_embeddings={value}"),
    ("padded_vocab_size n_vocab", "model.vocab_size={value}"),
    ("hidden_act activation activation_function mlp_class_name", "model.mlp={value}"),
    ("norm_type norm_class_name normalization", "model.norm={value}"),
    ("layer_norm_epsilon layer_norm_eps norm_eps", "model.rms_norm_eps={value}"),
    ("rope_base rotary_base", "model.rope_theta={value}"),
    ("position_embedding_type", "model.positions={value}"),
    ("bias use_bias", "model.attention_bias={value} and model.mlp_bias={value}"),
    ("tie_embeddings tie_weights weight_tying", "model.tie_word_embeddings={value}"),
    ("resid_pdrop embd_pdrop hidden_dropout dropout_rate", "model.dropout={value}"),
    ("attn_pdrop attn_dropout", "model.attention_dropout={value}"),
    ("init_std", "model.initializer_range={value}"),
    # --- where to begin
    (
        "model_name_or_path model_name pretrained pretrained_model initial_checkpoint_dir load_from load_checkpoint",
        "init.from={value}, a run or a Hugging Face folder, for its weights; the shape stands in the section model",
    ),
    ("init_from", "init.from for the weights of a run or a Hugging Face folder; to resume, the same command again"),
    (
        "resume resume_from resume_from_checkpoint auto_resume resume_training",
        f"{NO_KEY}: the same command goes on from the run's newest checkpoint; init.from begins with another's weights",
    ),
    ("overwrite_output_dir overwrite", f"{NO_KEY}: nothing overwrites a run; another run.name begins a new one"),
    # --- tokenizer and data
    ("tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir", "tokenizer.name={value}"),
    ("eos_token", "tokenizer.separator={value}"),
    ("pad_token", "tokenizer.pad={value}"),
    ("dataset dataset_name hf_dataset", "data.hub={value}, or data.path={value} for files"),
    ("data.name data.dataset", "data.hub={value}, or data.path={value} for files"),
    ("dataset_config dataset_config_name", "data.hub_config={value}"),
    ("dataset_split train_split", "data.hub_split={value}"),
    ("train_file train_files train_data data_path data_dir data_file dataset_path corpus", "data.path={value}"),
    ("validation_file val_file valid_file val_data eval_file", "data.validation_path={value}"),
    ("val_fraction val_ratio validation_ratio test_size val_split_fraction", "data.validation_share={value}"),
    ("validation_split_percentage", "data.validation_share, 0.05 for 5 percent"),
    ("text_column text_key", "data.text_field={value}"),
    ("streaming", "data.mode=stream"),
    ("cache_dir", "data.cache={value}"),
    ("shuffle_buffer shuffle_buffer_size", "data.shuffle_rows={value}"),
    ("data_mix mixture mixture_weights", "data.sources with a weight for each, or phases.*.mix for one phase"),
    ("num_workers dataloader_num_workers num_proc", f"{NO_KEY}: rows are read ahead, and all cores tokenise"),
    ("pack_sequences sample_packing", f"{NO_KEY}: rows are always packed; packing.document_mask keeps documents apart"),
    # --- batch
    (
        "micro_batch_size device_batch_size local_batch_size per_device_batch_size per_device_train_batch_size "
        "train_micro_batch_size_per_gpu mbs",
        "batch.micro_batch={value}",
    ),
    (
        "gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps accumulate_grad_batches",
        "batch.accumulation={value} (with batch.rows_per_step=null)",
    ),
    ("global_batch_size train_batch_size effective_batch_size gbs", "batch.rows_per_step={value}"),
    (
        "batch_size batch.size",
        "batch.micro_batch={value} for the rows of one forward pass on one rank, or batch.rows_per_step={value} "
        "for those of a step over all ranks",
    ),
    (
        "total_batch_size tokens_per_step tokens_per_batch",
        "batch.rows_per_step: these tokens, divided by batch.sequence_length",
    ),
    ("eval_batch_size per_device_eval_batch_size", f"{NO_KEY}: validation takes batch.micro_batch rows at once"),
    # --- engine
    ("bf16", "engine.precision=bf16"),
    ("fp16 half", "engine.precision=fp16"),
    ("fp32", "engine.precision=fp32"),
    ("dtype torch_dtype mixed_precision mixed_precision_param param_dtype", "engine.precision={value}"),
    ("torch_compile use_compile compile.enable compile_model", "engine.compile=on (or off, or auto)"),
    (
        "activation_checkpointing activation_checkpoint use_gradient_checkpointing activation_checkpoint.mode",
        "engine.gradient_checkpointing=full (or selective, none, auto)",
    ),
    ("attn_implementation attn_impl attn_backend attention_backend", "engine.attention={value}"),
    ("flash_attn flash_attention use_flash_attn use_flash_attention", "engine.attention=flash"),
    ("deepspeed deepspeed_config", "engine.ds_config={value}"),
    ("zero_stage", "engine.ds_config=zero{value}"),
    ("fsdp sharding_strategy", "engine.ds_config=zero3 (or zero1, zero2), which shards over the ranks"),
    ("use_cpu no_cuda", "engine.device=cpu"),
    ("accelerator", "engine.device={value}"),
    ("use_liger_kernel", "engine.loss=fused"),
    ("ddp_timeout", "engine.hang_s={value}"),
    # --- optimizer
    # optimizer.name is what it was called here, too
    ("optim optimizer_name optimizer_type optimizer.name optimizer.type", "optimizer.kind={value}"),
    ("use_muon", "optimizer.kind=muon"),
    ("muon_momentum muon_beta", "optimizer.momentum={value}"),
    (
        "ns_steps muon_ns_steps muon_num_ns_steps num_ns_steps newton_schulz_iterations backend_steps",
        "optimizer.newton_schulz_steps={value}",
    ),
    (
        "matrix_lr muon_lr hidden_lr",
        "phases.*.lr, the rate of the other parameters too: muon's updates are scaled to the size of AdamW's",
    ),
    (
        "embedding_lr unembedding_lr embed_lr head_lr lm_head_lr",
        "optimizer.embedding_lr_factor: this rate, divided by phases.*.lr",
    ),
    ("scalar_lr adam_lr adamw_lr", "phases.*.lr; optimizer.embedding_lr_factor times it for embeddings and head"),
    (
        "nesterov use_nesterov muon_nesterov adjust_lr_fn muon_scale_mode",
        f"{NO_KEY}: muon has Nesterov's momentum, and updates of the size of AdamW's (match_rms_adamw)",
    ),
    ("adam_beta1", "optimizer.beta1={value}"),
    ("adam_beta2", "optimizer.beta2={value}"),
    ("betas adam_betas", "optimizer.beta1 and optimizer.beta2"),
    ("adam_epsilon adam_eps epsilon", "optimizer.eps={value}"),
    (
        "max_grad_norm max_norm grad_clip clip_grad clip_grad_norm gradient_clip_val gradient_clip",
        "optimizer.gradient_clipping={value}",
    ),
    # --- phases
    ("learning_rate max_lr peak_lr base_lr", "phases.*.lr={value}"),
    ("min_lr lr_min end_lr min_learning_rate", "phases.*.final_lr={value}"),
    ("min_lr_ratio min_lr_factor min_lr_rate", "phases.*.final_lr: this share of phases.*.lr, as a learning rate"),
    (
        "max_steps max_iters num_steps train_steps training_steps total_steps max_train_steps num_train_steps "
        "num_iterations iters",
        "phases.*.steps={value}",
    ),
    ("num_train_epochs num_epochs max_epochs", "phases.*.epochs={value}"),
    ("train_tokens max_train_tokens total_tokens train.max_tokens", "phases.*.tokens={value}"),
    ("warmup warmup_iters num_warmup_steps lr_warmup_steps", "phases.*.warmup_steps={value}"),
    ("warmup_ratio warmup_fraction", "phases.*.warmup_steps: this share of phases.*.steps, in steps"),
    ("lr_decay_iters lr_decay_steps", "phases.*.steps={value}: cosine and linear fall until the end of their phase"),
    ("decay_lr", "phases.*.schedule=cosine (or linear, wsd; constant does not fall)"),
    ("lr_scheduler lr_scheduler_type lr_schedule scheduler lr_decay_style", "phases.*.schedule={value}"),
    ("cooldown_steps num_decay_steps", "phases.*.decay_steps={value} (with phases.*.schedule=wsd)"),
    ("decay_ratio cooldown_fraction warmdown_ratio", "phases.*.decay_steps: this share of phases.*.steps, in steps"),
    # --- evaluation, samples, checkpoints
    (
        "eval_interval eval_steps eval_every eval_freq val_interval val_check_interval val_loss_every eval.interval "
        "validation.freq evaluate.steps evaluate.interval",
        "evaluate.every={value}",
    ),
    ("eval_strategy evaluation_strategy", "evaluate.every, in steps (0 never evaluates)"),
    ("eval_iters eval_batches limit_val_batches eval.max_iters", "evaluate.rows: these batches, in rows"),
    ("max_new_tokens", "generation.max_tokens={value}"),
    ("sample_interval sample_every sample.steps sample.interval", "sample.every={value}"),
    ("prompt sample_prompt", "sample.prompts, a list"),
    (
        "save_steps save_interval save_every save_freq checkpoint_interval checkpoint_every ckpt_every ckpt_interval "
        "checkpoint.interval checkpoint.steps checkpoint.freq",
        "checkpoint.every={value}",
    ),
    ("save_strategy", "checkpoint.every, in steps (0 saves at the ends of phases only)"),
    ("save_total_limit max_checkpoints max_to_keep keep_latest_k save_top_k", "checkpoint.keep_last={value}"),
    ("load_best_model_at_end save_best", "checkpoint.keep_best=true"),
    ("async_save async_mode", "checkpoint.background=true"),
    # --- the console, W&B, the run
    (
        "log_interval log_every log_freq log_steps logging_steps log_every_n_steps",
        "track.print_every={value} (metrics.jsonl has every step)",
    ),
    ("report_to log_with", "track.to, a list of wandb, tensorboard and mlflow"),
    ("wandb_log use_wandb enable_wandb", "track.wandb=auto (or online, offline, off)"),
    ("wandb_mode", "track.wandb={value}"),
    ("project project_name", "track.wandb_project={value}"),
    ("entity wandb_team", "track.wandb_entity={value}"),
    ("wandb_run_name", "track.wandb_name={value}"),
    ("run_id wandb_run_id", "track.wandb_id={value}"),
    ("tags", "track.wandb_tags, a list"),
    ("tensorboard use_tensorboard logging_dir log_dir", "track.to=[wandb,tensorboard]; it writes to RUN/tensorboard"),
    ("mlflow use_mlflow", "track.to=[wandb,mlflow], to the server of MLFLOW_TRACKING_URI"),
    ("run_name experiment_name exp_name job_name", "run.name={value}"),
    (
        "output_dir out_dir save_dir checkpoint_dir dump_folder output_path checkpoint.folder",
        "run.folder={value}, the parent of all runs; run.name names this one",
    ),
    ("random_seed manual_seed data_seed", "run.seed={value}"),
    # --- what the command, a launcher or another verb does
    (
        "ranks world world_size nproc nproc_per_node n_gpu n_gpus num_gpus num_devices num_processes gpus devices ngpu",
        f"{NO_KEY}: --ranks {{value}} of `smoltrain train` (under torchrun --nproc-per-node), --world of `estimate`",
    ),
    ("help", f"{NO_KEY}: `smoltrain train --help` tells of the command, `smoltrain explain` of the keys"),
    ("local_rank node_rank nnodes num_nodes master_port", f"{NO_KEY}: the launcher says it (torchrun, deepspeed)"),
    ("do_train do_eval eval_only", f"{NO_KEY}: `smoltrain train` trains, and evaluates every evaluate.every steps"),
    ("push_to_hub hub_model_id", f"{NO_KEY}: `smoltrain push RUN OWNER/NAME`, afterwards"),
    ("early_stopping early_stopping_patience", f"{NO_KEY}: a plan is trained to its end; checkpoint.keep_best keeps"),
)
ALIASES = {word: answer for words, answer in ALIAS_TABLE for word in words.split()}

# Words that stand alone as `--WORD`, for "yes", whatever follows on the command line.
SWITCH_WORDS = (
    "bf16 fp16 fp32 half torch_compile use_compile compile_model streaming use_cpu no_cuda use_liger_kernel use_wandb",
    "wandb_log enable_wandb flash_attn use_flash_attn use_flash_attention use_gradient_checkpointing do_train do_eval",
    "use_muon nesterov use_nesterov muon_nesterov help",
    "eval_only auto_resume resume overwrite overwrite_output_dir load_best_model_at_end push_to_hub early_stopping",
)
SWITCHES = frozenset(word for words in SWITCH_WORDS for word in words.split())

# Values of other trainers, in lower case -> what they are called here.
VALUE_WORDS = {
    "bfloat16": "bf16",
    "torch.bfloat16": "bf16",
    "float16": "fp16",
    "torch.float16": "fp16",
    "float32": "fp32",
    "torch.float32": "fp32",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "eager": "math",
    "silu": "swiglu",
    "llamamlp": "swiglu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "adamw": "adamw",  # in capitals, as muon
    "muon": "muon",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "warmup_stable_decay": "wsd",
    "disabled": "off",
    "gpu": "cuda",
}
