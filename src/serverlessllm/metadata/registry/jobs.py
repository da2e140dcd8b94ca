"""Ingest jobs: one owner in the cluster, progress for all to see, takeover when the owner dies."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from serverlessllm.core.cluster import JobRecord, JobStage
from serverlessllm.core.errors import Fenced, MetadataUnavailable, ModelNotFound, Unavailable
from serverlessllm.core.ids import Epoch, ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.metadata.base import ABSENT, LeaseId, LeaseLost, Revision, RevisionMismatch
from serverlessllm.metadata.registry.changes import JobClaim, StoredModel
from serverlessllm.metadata.registry.keys import JOB_EPOCHS, JOBS, job_key, model_key
from serverlessllm.metadata.registry.models import Models
from serverlessllm.metadata.registry.records import decode, encode, readable

_FINAL = frozenset({JobStage.DONE, JobStage.FAILED})


class Jobs(Models):
    """The part of the registry that keeps `jobs/ingest/`, and publishes what a job made.

    While a job runs its record is bound to the owner's lease; a finished record stays, one a
    model, the newest `jobs_kept_max`.
    """

    async def get_job(self, model: ModelId) -> JobRecord | None:
        """The running ingest of a model, or its last finished one."""
        entry = await self._metadata.get(job_key(model))
        return None if entry is None else decode(entry.value, JobRecord, entry.key)

    async def list_jobs(self) -> tuple[JobRecord, ...]:
        """Running and finished ingests, one a model, by model."""
        listing = await self._metadata.list(JOBS)
        return tuple(r for e in listing.entries if (r := readable(e, JobRecord)) is not None)

    async def claim_job(self, model: ModelId, owner: str, ttl_s: float) -> JobClaim | JobRecord:
        """Become the one who ingests `model`, or learn who does: their record while they live.

        A finished job, and one whose owner's lease ran out, can be claimed again, with a higher
        epoch. Look at `claim.checkpoint` first: the last owner may have published.
        """
        lease = await self._metadata.lease(ttl_s)
        try:
            taken = await self._take_job(model, owner, lease)
            if isinstance(taken, JobRecord):
                await self._metadata.revoke(lease)
                return taken
            epoch, written = taken
            # Read after the claim: whatever an older owner publishes from here on, we notice.
            stored = await self.get_model(model)
        except BaseException:
            with suppress(MetadataUnavailable):  # then it runs out by itself
                await self._metadata.revoke(lease)
            raise
        checkpoint = stored.record.checkpoint if stored else None
        return JobClaim(
            model=model,
            owner=owner,
            epoch=epoch,
            lease=lease,
            ttl_s=ttl_s,
            written=written,
            model_revision=stored.revision if stored else ABSENT,
            checkpoint=checkpoint.id if checkpoint else None,
        )

    async def _take_job(
        self, model: ModelId, owner: str, lease: LeaseId
    ) -> tuple[Epoch, Revision] | JobRecord:
        for _ in range(self._settings.conflict_retries_max):
            entry = await self._metadata.get(job_key(model))
            if entry is not None:
                found = decode(entry.value, JobRecord, entry.key)
                if found.stage not in _FINAL:
                    return found
            epoch = Epoch(await self._metadata.put(JOB_EPOCHS, owner.encode()))
            record = JobRecord(model=model, owner=owner, epoch=epoch, stage=JobStage.RESOLVING)
            at = ABSENT if entry is None else entry.revision
            with suppress(RevisionMismatch):
                return epoch, await self._metadata.put(
                    job_key(model), encode(record), expect_revision=at, lease=lease
                )
        raise Unavailable(f"the ingest of {model} is claimed by too many at once; try again")

    async def keep_job(self, claim: JobClaim) -> None:
        """Start the claim's time again. Raises Fenced when it has run out: stop working."""
        try:
            await self._metadata.keep_alive(claim.lease)
        except LeaseLost:
            raise _fenced(claim) from None

    async def update_job(self, claim: JobClaim, record: JobRecord) -> None:
        """Show progress. Raises Fenced when the claim is no longer ours: stop working."""
        await self._write_job(claim, record, claim.lease)

    async def finish_job(self, claim: JobClaim, record: JobRecord) -> None:
        """End the job (`record.stage` DONE or FAILED); the record stays. Raises Fenced."""
        if record.stage not in _FINAL:
            raise ValueError(f"finish_job: stage {record.stage} is not final")
        await self._write_job(claim, record, None)
        await self._metadata.revoke(claim.lease)
        await self._prune_jobs()

    async def release_job(self, claim: JobClaim) -> None:
        """Give the job up unfinished: anybody may claim it at once. Harmless when it is lost."""
        await self._metadata.revoke(claim.lease)

    async def _write_job(self, claim: JobClaim, record: JobRecord, lease: LeaseId | None) -> None:
        value = encode(
            msgspec.structs.replace(record, model=claim.model, owner=claim.owner, epoch=claim.epoch)
        )
        for _ in range(self._settings.conflict_retries_max):
            try:
                claim.written = await self._metadata.put(
                    job_key(claim.model), value, expect_revision=claim.written, lease=lease
                )
            except LeaseLost:
                raise _fenced(claim) from None
            except RevisionMismatch:
                # Ours with a lost answer, or another's.
                claim.written = await self._current(claim)
            else:
                return
        raise Unavailable(f"the ingest of {claim.model} could not write its record; try again")

    async def _current(self, claim: JobClaim) -> Revision:
        """The revision of the job's record while it is this claim's; raises Fenced."""
        entry = await self._metadata.get(job_key(claim.model))
        if entry is None or decode(entry.value, JobRecord, entry.key).epoch != claim.epoch:
            raise _fenced(claim)
        return entry.revision

    async def _prune_jobs(self) -> None:
        entries = (await self._metadata.list(JOBS)).entries
        over = [e for e in entries if (r := readable(e, JobRecord)) and r.stage in _FINAL]
        over.sort(key=lambda e: e.revision)
        for entry in over[: max(0, len(over) - self._settings.jobs_kept_max)]:
            await self._delete_if_unchanged(entry)

    async def publish_model(self, claim: JobClaim, record: ModelRecord) -> StoredModel:
        """Make the job's checkpoint the model's, if the claim is the current one.

        Of all who ever claimed the job from the same state, exactly one gets through: the write
        compares with the model's record as it was. A spec that the operator changed meanwhile is
        kept; a model that the operator deleted meanwhile stays deleted.

        Raises:
            Fenced: the claim ran out, or another owner published.
            ModelNotFound: the model was deleted; who claims anew would bring it back.
            Conflict: a name of a model that is new here belongs to another model.
        """
        for _ in range(self._settings.conflict_retries_max):
            await self.keep_job(claim)
            await self._current(claim)
            entry = await self._metadata.get(model_key(claim.model))
            if entry is None:
                if claim.model_revision != ABSENT:
                    raise ModelNotFound(
                        f"model {claim.model} was deleted while it was ingested", param="model"
                    )
                await self._claim_names(record.spec)
            else:
                before = decode(entry.value, ModelRecord, entry.key)
                if before.checkpoint is not None and before.checkpoint == record.checkpoint:
                    return StoredModel(record=before, revision=entry.revision)
                if (before.checkpoint.id if before.checkpoint else None) != claim.checkpoint:
                    raise Fenced(f"model {claim.model} was published by another owner")
                if entry.revision != claim.model_revision:
                    record = msgspec.structs.replace(before, checkpoint=record.checkpoint)
            with suppress(RevisionMismatch):
                return await self._write_model(record, entry)
        raise Unavailable(f"model {claim.model} is being changed by too many at once; try again")


def _fenced(claim: JobClaim) -> Fenced:
    return Fenced(f"the claim to ingest {claim.model} ran out: another owner may have it")
