"""The chat interface of a loaded model: messages in, text out. `vl3_jax.load` returns a `ChatModel`."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError, SettingError, TooLongError
from vl3_jax.inference import answer_settings
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.answer_text import AnswerText
from vl3_jax.inference.buckets import power_of_two
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.inference.requests import LENGTH, Generation, Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.inference.token_constraint import ConstraintCompiler, TokenConstraint
from vl3_jax.processing.media_cache import MediaCache
from vl3_jax.processing.media_source import reopenable
from vl3_jax.processing.messages import MediaPart, Region, Turn, parse_messages
from vl3_jax.processing.processor import Processor, ProcessorOutput
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.remote_media import RemotePolicy, fetched

logger = logging.getLogger(__name__)
Messages = Sequence[Mapping[str, Any] | Turn]
_CUT = "max_new_tokens cuts the answer off before it matches its constraint; give it more tokens"
_LED = "max_new_tokens ends the answer early, in a form that matches its constraint; give it more tokens"
MOST_ROWS = 8  # conversations of a batch that are answered side by side


@dataclasses.dataclass
class GenerationOutput:
    """A generated answer with the statistics of its generation.

    Attributes:
      text: The answer without its stop token.
      token_ids: The generated ids, the stop token included.
      finish_reason: "stop" if a stop token, a stop string or the constraint ended the answer, "length" if
        `max_new_tokens` did.
      processed: The prompt as the model received it.
      logprobs: A list of (id, log-probability) for each generated token, most likely first; None if not requested.
      seconds: Seconds of loading, processing, compilation, prefill and decoding.
      matches: Whether the text is what its constraint asks for, which `max_new_tokens` may prevent; None without one.
      hidden: Hidden states of the tokens that the engine watches, [D] each, by their index in `token_ids`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    processed: ProcessorOutput
    logprobs: list[list[tuple[int, float]]] | None
    seconds: dict[str, float]
    matches: bool | None = None
    hidden: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def warnings(self) -> list[str]:
        """What a person should know about the media and the answer, one line each."""
        cut = [] if self.matches is None or self.finish_reason != LENGTH else [_LED if self.matches else _CUT]
        return self.processed.warnings + cut

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second of decoding."""
        return len(self.token_ids) / self.seconds["decode"] if self.seconds["decode"] else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the object that `vl3 ask --json` prints, as plain values for `json.dumps`."""
        prompt = self.processed.sample.tokens.tolist()
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "prompt_token_ids": prompt,
            "prompt_tokens": len(prompt),
            "visual_tokens": self.processed.visual_tokens,
            "visual_tokens_before_pruning": self.processed.visual_tokens_before_pruning,
            "prune_threshold": self.processed.prune_threshold,
            "frames": [{"indices": video.indices, "timestamps": video.timestamps} for video in self.processed.videos],
            **({"logprobs": self.logprobs} if self.logprobs is not None else {}),
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


class ChatModel:
    """A model with its processor and its engine.

    Args:
      engine: The engine, which holds the model and its parameters.
      processor: Turns messages into samples.
      generation_config: Stop tokens and repetition penalty of the checkpoint.
      load_seconds: Seconds that loading took, reported with each answer.
    """

    def __init__(
        self, engine: Engine, processor: Processor, generation_config: GenerationConfig, load_seconds: float = 0.0
    ):
        self.engine = engine
        self.processor = processor
        self.generation_config = generation_config
        self.load_seconds = load_seconds
        self._media = MediaCache()
        vocab_size = engine.model.config.text.vocab_size
        self._constraints = ConstraintCompiler(processor.tokenizer, generation_config.stop_ids, vocab_size)

    def chat(
        self,
        question: str = "",
        *,
        images: Any = (),
        videos: Any = (),
        system: str | None = None,
        messages: Messages | None = None,
        stream: bool = False,
        **settings: Any,
    ) -> str | Iterator[str]:
        """Answers a question about images and videos, or continues a conversation.

        Args:
          question: The question; the media come before it, images first.
          images: A list of paths, references (`file://`, `data:`), bytes, PIL images or arrays; or one of these.
          videos: A list of paths, references, folders of frames, or arrays [T, H, W, 3] uint8; or one of these.
          system: A system prompt.
          messages: A conversation, instead of the arguments above (see docs/inference.md).
          stream: Whether to return an iterator over pieces of text instead of the whole text.
          **settings: Fields of `SamplingConfig` (`max_new_tokens`, `temperature`, ...) and settings of the processor
            (`fps`, `max_frames`, ...); `allow_remote` allows http(s):// references; `adapter` names the LoRA adapter
            that answers; `json_schema`, `regex` or `choices` says what the answer must match (`ConstraintConfig`).

        Returns:
          The answer, or an iterator over its pieces.

        Raises:
          InputError: Media that cannot be read, an unknown or invalid setting, constraint or adapter, or a prompt that
            exceeds the context.
        """
        if messages is None:
            messages = conversation(question, images=images, videos=videos, system=system)
        elif question or system or _several(images, 3) or _several(videos, 4):
            raise InputError("messages hold the question, the media and the system prompt; leave the others out")
        if stream:
            return self._stream(messages, settings)
        answer = self.answer(messages, **settings)
        _log_cut(answer)
        return answer.text

    def answer(
        self, messages: Messages, *, on_text: Callable[[str], None] | None = None, **settings: Any
    ) -> GenerationOutput:
        """Answers a conversation and returns the text with token ids, frames, log-probabilities and timings.

        Args:
          messages: The conversation.
          on_text: Called with each piece of text as soon as it is generated.
          **settings: The settings of `chat`.

        Raises:
          InputError: As `chat`.
        """
        return self._answers([messages], [self.resolve(**settings)], on_text)[0]

    def answer_batch(self, conversations: Sequence[Messages], **settings: Any) -> list[GenerationOutput]:
        """Answers several conversations side by side; each output has the seconds of its own request."""
        return self._answers(conversations, [self.resolve(**settings)] * len(conversations))

    def submit(self, messages: Messages, *, streams: bool = True, **settings: Any) -> "Answering":
        """Begins to answer a conversation beside others; iterate over the result for the pieces of its text.

        Args:
          messages: The conversation.
          streams: As of `vl3_jax.inference.requests.Request`.
          **settings: The settings of `chat`.

        Raises:
          InputError: As `chat`.
        """
        start = time.perf_counter()
        resolved = self.resolve(**settings)
        turns = self._prepare(messages, resolved)
        prompt = self._process(turns, resolved)
        return self._submit(turns, prompt, resolved, time.perf_counter() - start, streams)

    def segment(self, *arguments: Any, **keywords: Any) -> Any:
        """Draws objects; see `vl3_jax.inference.grounded_model.GroundedModel`, which is loaded from a Sa2VA.

        Raises:
          InputError: This model has no SAM-2.
        """
        raise InputError(
            "this model draws no masks; `vl3 convert init --base MODEL --sam2 SAM2 DST` makes one that can learn it"
        )

    def process(self, messages: Messages, **settings: Any) -> ProcessorOutput:
        """Returns the prompt that `answer` gives to the model.

        Raises:
          InputError: As `chat`.
        """
        return self.read(messages, self.resolve(**settings))

    def resolve(self, config: ProcessorConfig | None = None, /, **settings: Any) -> AnswerSettings:
        """Returns the settings of an answer: those that are given, else those of the checkpoint.

        Args:
          config: What takes the place of the checkpoint's settings of the processor; None leaves them.
          **settings: The settings of `chat`.

        Raises:
          InputError: An unknown setting or adapter.
          SettingError: A value that a setting cannot have.
        """
        sampling = SamplingConfig(repetition_penalty=self.generation_config.repetition_penalty)
        resolved = answer_settings.resolve(settings, sampling, config or self.processor.config)
        if resolved.adapter is not None:
            self.engine.adapter_number(resolved.adapter)
        if not resolved.constraint.is_free:
            self._constraints.compile(resolved.constraint)
        vocabulary = self.engine.model.config.text.vocab_size
        if resolved.sampling.logprobs > vocabulary:
            raise SettingError("logprobs", resolved.sampling.logprobs, f"the model has {vocabulary} tokens; give fewer")
        return resolved

    def read(self, messages: Messages, settings: AnswerSettings, media: MediaCache | None = None) -> ProcessorOutput:
        """Fetches and decodes the media of a conversation and returns its prompt; several threads may do so at once.

        Args:
          messages: The conversation.
          settings: The settings of its answer.
          media: Where decoded media are kept and found; by default with those of the other answers of this model.

        Raises:
          InputError: A message or a medium that cannot be read; the error names it.
          TooLongError: The text alone exceeds the context.
        """
        return self._process(self._prepare(messages, settings), settings, media)

    def constraint(self, settings: AnswerSettings) -> TokenConstraint | None:
        """Returns what one answer must match; None if it is free. It may be called from several threads."""
        return self._constraints.constraint(settings.constraint, settings.sampling.max_new_tokens)

    def _answers(
        self, conversations: Sequence[Messages], settings: Sequence[AnswerSettings], on_text: Callable | None = None
    ) -> list[Any]:
        """Answers conversations, each with its settings; `on_text` gets the pieces of the first one's text."""
        start = time.perf_counter()
        prepared = list(map(self._prepare, conversations, settings))
        processed = list(map(self._process, prepared, settings))
        if not processed:
            return []
        seconds = time.perf_counter() - start
        self.engine.reserve(rows=min(power_of_two(len(processed)), MOST_ROWS))
        streams = on_text is not None
        answers = [
            self._submit(turns, prompt, own, seconds, streams)
            for turns, prompt, own in zip(prepared, processed, settings, strict=True)
        ]
        try:
            if on_text is not None:
                for piece in answers[0]:
                    on_text(piece)
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:  # after Ctrl-C or an error; the complete ones stay as they are
                answer.cancel()

    def _completed(self, turns: Sequence[Turn], settings: AnswerSettings, answer: GenerationOutput) -> GenerationOutput:
        """Returns a complete answer to a conversation as its user gets it."""
        return answer

    def _stream(self, messages: Messages, settings: Mapping[str, Any]) -> Iterator[str]:
        answering = self.submit(messages, **settings)
        yield from answering
        _log_cut(answering.result())

    def _submit(
        self, turns: list[Turn], prompt: ProcessorOutput, settings: AnswerSettings, seconds: float, streams: bool
    ) -> "Answering":
        text = AnswerText(self.processor.tokenizer, settings.sampling.stop)
        constraint = self.constraint(settings)
        request = Request(prompt.sample, settings.sampling, text.add, streams, settings.adapter, constraint)
        generation = self.engine.submit(request)
        complete = functools.partial(self._completed, turns, settings)
        return Answering(prompt, text, generation, {"load": self.load_seconds, "process": seconds}, complete)

    def _process(self, turns: list[Turn], settings: AnswerSettings, media: MediaCache | None = None) -> ProcessorOutput:
        cache = self._media if media is None else media
        return Processor(self.processor.tokenizer, settings.processor, self.processor.on_frame, cache)(turns)

    def _prepare(self, messages: Messages, settings: AnswerSettings) -> list[Turn]:
        """Checks a conversation, measures its text, and fills in video options.

        What is remote and allowed is fetched, and what can be read only once is read.
        """
        turns = parse_messages(messages)
        context = self.engine.model.config.text.max_position_embeddings
        texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
        if not self.processor.tokenizer.may_fit(texts, context):
            length = sum(map(len, texts))
            raise TooLongError(
                f"{length:,} characters of text exceed the context of {context} tokens; shorten the text"
            )
        policy = RemotePolicy() if settings.allow_remote else None

        def prepared(part: str | MediaPart | Region) -> str | MediaPart | Region:
            if not isinstance(part, MediaPart):
                return part
            options = {**settings.video, **part.options} if part.kind == "video" else part.options
            source = reopenable(fetched(part.source, policy), part.kind)
            return dataclasses.replace(part, source=source, options=options)

        return [Turn(turn.role, [prepared(part) for part in turn.parts]) for turn in turns]


@dataclasses.dataclass(eq=False)
class Answering:
    """An answer while it is generated.

    Attributes:
      processed: The prompt.
      text: The text so far.
      generation: The tokens so far.
      seconds: Seconds of loading and processing.
      complete: Makes of the complete answer what its user gets.
    """

    processed: ProcessorOutput
    text: AnswerText
    generation: Generation
    seconds: dict[str, float]
    complete: Callable[[GenerationOutput], GenerationOutput]

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of whole characters as they come, up to a stop string. Leaving early cancels the rest."""
        for _ in self.generation:
            yield from self.text.take()
        self.text.end()
        yield from self.text.take()

    def cancel(self) -> None:
        """Ends the answer."""
        self.generation.cancel()

    def result(self) -> GenerationOutput:
        """Runs the engine until the answer is complete, and returns it."""
        generation, constraint = self.generation.result(), self.generation.request.constraint
        self.text.end()
        answer = GenerationOutput(
            text=self.text.whole,
            token_ids=generation.tokens,
            finish_reason=generation.finish_reason or "",
            processed=self.processed,
            logprobs=generation.logprobs,
            seconds=self.seconds | dataclasses.asdict(generation.timings),
            matches=None if constraint is None else constraint.matches,
            hidden=generation.hidden,
        )
        return self.complete(answer)


def _log_cut(answer: GenerationOutput) -> None:
    """Logs that a constrained answer ended before its time, where only its text is returned."""
    for warning in answer.warnings[len(answer.processed.warnings) :]:
        logger.warning(warning)


def _several(media: Any, dimensions: int) -> list[Any]:
    """Returns media as a list: a single one, which need not stand in a list, alone.

    Args:
      media: One image or video, or any number of them.
      dimensions: Of the array of one of them; an array of more is a batch.
    """
    if isinstance(media, list | tuple):
        return list(media)
    if hasattr(media, "__array__"):
        single = getattr(media, "ndim", dimensions) <= dimensions
    else:
        single = isinstance(media, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(media, "read")
    return [media] if single or not isinstance(media, Iterable) else list(media)


def conversation(
    question: str, *, images: Any = (), videos: Any = (), system: str | None = None
) -> list[dict[str, Any]]:
    """Builds the messages of one user turn: its media in front of the question, after the system prompt if any.

    Raises:
      InputError: There is neither a question nor an image or video.
    """
    content = [{"type": "image", "image": image} for image in _several(images, 3)]
    content += [{"type": "video", "video": video} for video in _several(videos, 4)]
    if not question and not content:
        raise InputError("nothing to answer: give a question, an image or a video")
    turn = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    return [*([{"role": "system", "content": system}] if system else []), turn]
