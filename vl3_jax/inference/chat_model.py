"""A loaded model that answers: messages in, text out. What `vl3_jax.load` returns."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.engine import DecodeOutput, Engine, Timings
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.inference.sampling import SamplingConfig
from vl3_jax.processing.processor import Processor, ProcessorOutput

Messages = Sequence[Mapping[str, Any]]

# Where each setting of an answer goes: to `Sampling`, to the processor's configuration (under its name there), or to
# every video of the conversation that does not say for itself.
SAMPLING_SETTINGS = tuple(field.name for field in dataclasses.fields(SamplingConfig))
PROCESSOR_SETTINGS = {
    "fps": "fps",
    "max_frames": "max_frames",
    "preprocess": "preprocess",
    "max_visual_tokens": "max_tokens",
    "image_merge": "image_merge",
    "prune_threshold": "prune_threshold",
}
VIDEO_SETTINGS = ("start", "end")


@dataclasses.dataclass
class GenerationOutput:
    """One answer and how it came about; `as_json` is what `vl3 ask --json` prints."""

    text: str
    token_ids: list[int]
    finish_reason: str
    processed: ProcessorOutput
    logprobs: list[list[tuple[int, float]]] | None
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens (all but the first, which prefill gives) per second of decoding."""
        return (len(self.token_ids) - 1) / self.seconds["decode"] if self.seconds["decode"] else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        prompt = self.processed.sample.tokens.tolist()
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "prompt_token_ids": prompt,
            "prompt_tokens": len(prompt),
            "visual_tokens": self.processed.visual_tokens,
            "visual_tokens_before_pruning": self.processed.visual_tokens_before_pruning,
            "frames": [{"indices": video.indices, "timestamps": video.timestamps} for video in self.processed.videos],
            **({"logprobs": self.logprobs} if self.logprobs is not None else {}),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


class ChatModel:
    """A model, its processor and an engine.

    Args:
      engine: the model with its parameters.
      processor: messages to samples.
      defaults: what the checkpoint says about generation.
      load_seconds: how long loading took, for reports.
    """

    def __init__(self, engine: Engine, processor: Processor, defaults: GenerationConfig, load_seconds: float = 0.0):
        self.engine = engine
        self.processor = processor
        self.defaults = defaults
        self.load_seconds = load_seconds

    def chat(
        self,
        question: str = "",
        *,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        system: str | None = None,
        messages: Messages | None = None,
        stream: bool = False,
        **settings: Any,
    ) -> str | Iterator[str]:
        """Answers a question about pictures and videos, or a whole conversation.

        Args:
          question: what to ask; the media come before it, pictures first.
          images: paths, bytes, PIL images or arrays.
          videos: paths, folders of frames, or arrays [T, H, W, 3] uint8.
          system: a system prompt.
          messages: a conversation instead of the above (see docs/inference.md).
          stream: give an iterator over pieces of text instead of the whole text.
          **settings: fields of `Sampling` (max_new_tokens, temperature, ...) and of the processor (fps, ...).

        Raises:
          InputError: media that cannot be read, settings that cannot be, a prompt beyond the context.
        """
        if messages is None:
            messages = conversation(question, images=images, videos=videos, system=system)
        if stream:
            return self._stream(messages, settings)
        return self.answer(messages, **settings).text

    def answer(
        self, messages: Messages, *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> GenerationOutput:
        """Like `chat` for one conversation, with everything there is to know about the answer.

        Args:
          messages: the conversation.
          on_text: given each piece of text as it comes.
          **settings: as of `chat`.
        """
        chosen = self._settings(settings)
        processed, process_seconds = self._process([messages], chosen)
        steps, timings = [], Timings()

        def keep_steps() -> Iterator[DecodeOutput]:
            for step in self._steps(processed, chosen, timings):
                steps.append(step)
                yield step

        for piece in self._pieces(keep_steps()):
            if on_text is not None:
                on_text(piece)
        return self._answer(0, processed[0], steps, chosen.sampling, self._seconds(process_seconds, timings))

    def answer_batch(self, conversations: Sequence[Messages], **settings: Any) -> list[GenerationOutput]:
        """Answers several conversations together; their seconds are those of the whole batch."""
        chosen = self._settings(settings)
        processed, process_seconds = self._process(conversations, chosen)
        timings = Timings()
        steps = list(self._steps(processed, chosen, timings))
        seconds = self._seconds(process_seconds, timings)
        return [self._answer(row, item, steps, chosen.sampling, seconds) for row, item in enumerate(processed)]

    def _settings(self, given: Mapping[str, Any]) -> "_Settings":
        given = {name: value for name, value in given.items() if value is not None}
        if not given.pop("prune", True):
            changes: dict[str, Any] = {"prune_threshold": None}
        else:
            changes = {}
        sampling = {"repetition_penalty": self.defaults.repetition_penalty}
        video = {}
        for name, value in given.items():
            if name in SAMPLING_SETTINGS:
                sampling[name] = value
            elif name in PROCESSOR_SETTINGS:
                changes[PROCESSOR_SETTINGS[name]] = value
            elif name in VIDEO_SETTINGS:
                video[name] = value
            else:
                known = sorted([*SAMPLING_SETTINGS, *PROCESSOR_SETTINGS, *VIDEO_SETTINGS, "prune"])
                raise InputError(f"unknown setting {name!r}; known are {', '.join(known)}")
        config = dataclasses.replace(self.processor.config, **changes)
        processor = Processor(self.processor.tokenizer, config, self.processor.on_frame)
        return _Settings(SamplingConfig(**sampling), processor, video)

    def _process(self, conversations: Sequence[Messages], chosen: "_Settings") -> tuple[list[ProcessorOutput], float]:
        started = time.perf_counter()
        processed = [chosen.processor(_with_video_defaults(messages, chosen.video)) for messages in conversations]
        return processed, time.perf_counter() - started

    def _steps(
        self, processed: Sequence[ProcessorOutput], chosen: "_Settings", timings: Timings
    ) -> Iterator[DecodeOutput]:
        return self.engine.generate([item.sample for item in processed], chosen.sampling, timings)

    def _stream(self, messages: Messages, settings: Mapping[str, Any]) -> Iterator[str]:
        chosen = self._settings(settings)
        processed, _ = self._process([messages], chosen)
        yield from self._pieces(self._steps(processed, chosen, Timings()))

    def _pieces(self, steps: Iterable[DecodeOutput]) -> Iterator[str]:
        """The first row's text, whole characters at a time."""
        text = self.processor.tokenizer.stream()
        for step in steps:
            if piece := "".join(text.push(token) for token in _live(step, 0) if token not in self.defaults.stop_ids):
                yield piece
        if rest := text.flush():
            yield rest

    def _seconds(self, process: float, timings: Timings) -> dict[str, float]:
        return {"load": self.load_seconds, "process": process, **dataclasses.asdict(timings)}

    def _answer(
        self, row: int, processed: ProcessorOutput, steps, sampling: SamplingConfig, seconds: dict[str, float]
    ) -> GenerationOutput:
        tokens = [token for step in steps for token in _live(step, row)]
        stopped = bool(tokens) and tokens[-1] in self.defaults.stop_ids
        logprobs = None
        if sampling.logprobs:
            ids, values = (
                np.concatenate([getattr(step, name)[row][step.valid[row]] for step in steps])
                for name in ("logprob_ids", "logprobs")
            )
            logprobs = [
                [(int(i), round(float(v), 6)) for i, v in zip(*pair, strict=True)]
                for pair in zip(ids, values, strict=True)
            ]
        return GenerationOutput(
            text=self.processor.tokenizer.decode(tokens[:-1] if stopped else tokens),
            token_ids=tokens,
            finish_reason="stop" if stopped else "length",
            processed=processed,
            logprobs=logprobs,
            seconds=seconds,
        )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of one answer, each where it belongs."""

    sampling: SamplingConfig
    processor: Processor
    video: dict[str, Any]


def _live(step: DecodeOutput, row: int) -> list[int]:
    """What a row really generated in this step."""
    return step.tokens[row][step.valid[row]].tolist()


def _with_video_defaults(messages: Messages, defaults: Mapping[str, Any]) -> Messages:
    """Gives every video part without its own start or end the one asked for all."""

    def part_of(part: Any) -> Any:
        is_video = isinstance(part, Mapping) and "video" in part
        return {**defaults, **part} if is_video else part

    def message_of(message: Any) -> Any:
        content = message.get("content") if isinstance(message, Mapping) else None
        return {**message, "content": [part_of(part) for part in content]} if isinstance(content, list) else message

    return [message_of(message) for message in messages] if defaults else messages


def conversation(
    question: str, *, images: Sequence[Any] = (), videos: Sequence[Any] = (), system: str | None = None
) -> list[dict[str, Any]]:
    """One user turn with its media in front of the question, after the system prompt if there is one."""
    content = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video} for video in videos]
    if not question and not content:
        raise InputError("nothing to answer: give a question, a picture or a video")
    turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    return [*([{"role": "system", "content": system}] if system else []), turn]


def load(
    source: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh=None,
    quantize: str | None = None,
    token: str | None = None,
    quiet: bool = True,
    on_status: Callable[[str], None] = lambda line: None,
) -> ChatModel:
    """Loads a checkpoint of any kind to answer questions.

    Args:
      source: an Orbax folder, a training workdir, a Hugging Face folder read in place, or a Hub id.
      dtype: "float32" or "bfloat16", of weights and activations; by default float32 on a CPU, else bfloat16.
      mesh: places the parameters over several devices (`vl3_jax.parallel.mesh.make_mesh`).
      quantize: "int8" stores the layers' weights in int8 (see `vl3_jax.model.quantize`).
      token: of a private Hub repository.
      quiet: no progress bar.
      on_status: called with a line before something slow.

    Raises:
      InputError: the checkpoint is not there, not whole, or has no tokenizer.
    """
    import jax

    from vl3_jax import compilation_cache
    from vl3_jax.checkpoint import load as load_checkpoint
    from vl3_jax.model import VideoLLaMA3
    from vl3_jax.model.quantize import quantize_leaf

    compilation_cache.enable()
    started = time.perf_counter()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}: use int8 or leave it out")
    convert = quantize_leaf if quantize else None
    checkpoint = load_checkpoint(source, dtype=dtype, mesh=mesh, token=token, quiet=quiet, convert=convert)
    processor = Processor.from_folder(checkpoint.files)
    defaults = GenerationConfig.read(checkpoint.files, processor.tokenizer.stop_ids)
    look = {"image_mean": processor.config.image_mean, "image_std": processor.config.image_std}
    config = dataclasses.replace(checkpoint.config, vision=dataclasses.replace(checkpoint.config.vision, **look))
    engine = Engine(
        VideoLLaMA3(config, dtype=dtype), checkpoint.params, defaults.stop_ids, on_status=on_status, mesh=mesh
    )
    return ChatModel(engine, processor, defaults, time.perf_counter() - started)
