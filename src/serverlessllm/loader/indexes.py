"""The `.idx` files of a node: each is checked against its checkpoint's id before it is used."""

from __future__ import annotations

from serverlessllm.checkpoint.index import Index, checkpoint_id, decode_index
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.residency import TierDirectory


class Indexes:
    """Decoded indexes, the last `count_max` of them. Used from several threads: every operation
    on the dictionary is one."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._known: dict[CheckpointId, Index] = {}

    def of_tier(self, tier: TierDirectory, checkpoint: CheckpointId) -> Index | None:
        """The index beside a `.bin`; None when it is missing or not the one. Blocks.

        Read each time, though it may be known: what lies there is what others will read.
        """
        data = tier.read_index(checkpoint)
        if data is None:
            return None
        try:
            return self.decode(data, checkpoint)
        except CheckpointError:
            return None

    def decode(self, data: bytes, checkpoint: CheckpointId) -> Index:
        """The index that these bytes are.

        Raises:
            CheckpointError: they are not the index of `checkpoint`.
        """
        if checkpoint_id(data) != checkpoint:
            raise CheckpointError(
                f"the index of checkpoint {checkpoint[:12]}… is not the one that was registered: "
                "ingest the model again (`sllm pull`)"
            )
        index = self._known.get(checkpoint) or decode_index(data)
        self._known[checkpoint] = index
        while len(self._known) > self._count_max:
            self._known.pop(next(iter(self._known)), None)
        return index
