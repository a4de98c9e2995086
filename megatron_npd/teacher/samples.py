"""The samples of a rollout shard that models can score, and what each model reads before the response."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_npd.config.settings import AnnotateConfig
from megatron_npd.models.families.base import ModelSpec
from megatron_npd.store.responses import Responses, read_responses
from megatron_npd.store.scores import Ids


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """What all shards share: what models can take, and what opens a response if a sample's prompt does not say it."""

    cfg: AnnotateConfig
    student: ModelSpec
    longest: int  # tokens of prompt and response together that the teacher can score
    shared_vocab_size: int  # teacher and student both know the ids below
    teacher_generation_prompt: Ids  # of the teacher's chat template
    teacher_start: Ids  # the teacher's BOS or end-of-document token
    student_start: Ids


@dataclass(frozen=True, kw_only=True)
class Samples(Responses):
    """The responses of a shard with what each model reads before them."""

    teacher_prompts: list[Ids]
    teacher_openings: list[Ids]
    student_openings: list[Ids]


def read_samples(source: Path, setting: ScoringContext) -> Samples:
    """Read a sealed rollout shard.

    Raises:
        UserError: It is not sealed, damaged, or has other columns.
    """
    read = read_responses(
        source,
        vocab_size=setting.shared_vocab_size,
        known_to="teacher and student both know",
        longest=setting.longest,
    )
    student_openings, teacher_prompts, teacher_openings = [], [], []
    for prompt, own, generation_prompt_len in zip(
        read.prompts, read.own_prompts, read.table["generation_prompt_len"].to_pylist(), strict=True
    ):
        opening = prompt[len(prompt) - generation_prompt_len :]
        student_openings.append(opening if generation_prompt_len else setting.student_start)
        teacher_prompts.append(own if len(own) else prompt)
        shared = opening if generation_prompt_len else setting.teacher_start
        teacher_openings.append(setting.teacher_generation_prompt if len(own) else shared)
    return Samples(
        **{field.name: getattr(read, field.name) for field in fields(read)},
        teacher_prompts=teacher_prompts,
        teacher_openings=teacher_openings,
        student_openings=student_openings,
    )
