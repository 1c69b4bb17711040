"""A micro-batch: ids as they cross to a device, and what a model takes of them there.

Suffixes of names are shapes: B rows, T targets per row, S = T + 1 ids.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from smoltrain.kernels.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Rows of T + 1 ids. Inputs, labels and positions, int64 (B, T) each, are made of them where they are needed.

    So 4 (T + 1) bytes a row are all that crosses to a device, and they lie end to end: a view with gaps, pinned or not,
    would first be copied to memory that is not pinned, for which the host waits.
    """

    ids_BS: torch.Tensor  # int32, contiguous
    separator_id: int | None = None  # of the token behind each document; None: a row is one text
    num_labelled: int | None = None  # rows behind so many have no label; None: all have
    num_documents: int | None = None  # which the host has counted before the rows went to a device

    def __post_init__(self) -> None:
        assert self.ids_BS.dtype == torch.int32
        assert self.ids_BS.is_contiguous()

    @property
    def ids_BT(self) -> torch.Tensor:
        """What goes into the model."""
        return self.ids_BS[:, :-1].long()

    @property
    def labels_BT(self) -> torch.Tensor:
        """The ids one place on; IGNORE_INDEX is no target."""
        labels_BT = self.ids_BS[:, 1:].long()
        if self.separator_id is not None:
            # Behind a separator comes the next document's first token, which nothing before it tells.
            labels_BT.masked_fill_(self.ids_BS[:, :-1] == self.separator_id, IGNORE_INDEX)
        if self.num_labelled is not None:
            labels_BT[self.num_labelled :] = IGNORE_INDEX
        return labels_BT

    @property
    def positions_BT(self) -> torch.Tensor | None:
        """With a document mask each token's place in its document; a row begins at 0, even within a document."""
        if self.separator_id is None:
            return None
        places_T = torch.arange(self.ids_BS.size(1) - 1, device=self.ids_BS.device)
        is_behind_separator = self.ids_BS[:, :-2] == self.separator_id
        begins_BT = F.pad(torch.where(is_behind_separator, places_T[1:], 0), (1, 0))
        return places_T - begins_BT.cummax(1).values

    def document_arguments(self) -> dict[str, Any]:
        """What a model is told of packed documents: see LanguageModel.forward. Empty without a document mask."""
        if self.separator_id is None:
            return {}
        return {"positions_BT": self.positions_BT, "num_documents": self.num_documents}

    def slice_rows(self, first: int, last: int) -> "Batch":
        """Its rows from `first` up to, but without, `last`; not copied."""
        num_labelled = None if self.num_labelled is None else min(max(0, self.num_labelled - first), last - first)
        return Batch(self.ids_BS[first:last], self.separator_id, num_labelled)

    def to(self, device: torch.device) -> "Batch":
        """The same on this device. The host does not wait for a GPU, which only pinned memory allows."""
        num_documents = self.num_documents
        if self.separator_id is not None and num_documents is None:
            num_documents = self._count_documents()
        if device.type == "cuda":
            # Not on a stream of its own: 32,768 tokens are 128 KiB, 5 microseconds at 25 GB/s.
            ids_BS = self.ids_BS.pin_memory().to(device, non_blocking=True)
        else:
            ids_BS = self.ids_BS.to(device)
        return replace(self, ids_BS=ids_BS, num_documents=num_documents)

    def _count_documents(self) -> int:
        """One begins with each row, and one behind each separator that is not a row's last input."""
        return len(self.ids_BS) + int((self.ids_BS[:, :-2] == self.separator_id).sum())
