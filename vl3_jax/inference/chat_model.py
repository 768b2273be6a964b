"""The chat interface of a loaded model: messages in, text out. `vl3_jax.load` returns a `ChatModel`."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vl3_jax.errors import InputError, SettingError
from vl3_jax.inference import answer_settings
from vl3_jax.inference.engine import DecodeOutput, Engine, Timings
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.messages import MediaPart, Turn, parse_messages
from vl3_jax.processing.processor import Processor, ProcessorOutput
from vl3_jax.processing.remote_media import RemotePolicy, fetched

if TYPE_CHECKING:
    import jax

Messages = Sequence[Mapping[str, Any] | Turn]


@dataclasses.dataclass
class GenerationOutput:
    """A generated answer with the statistics of its generation.

    Attributes:
      text: The answer without its stop token.
      token_ids: The generated ids, the stop token included.
      finish_reason: "stop" if a stop token ended the answer, "length" if `max_new_tokens` did.
      processed: The prompt as the model received it.
      logprobs: A list of (id, log-probability) for each generated token, most likely first; None if not requested.
      seconds: Seconds of loading, processing, compilation, prefill and decoding.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    processed: ProcessorOutput
    logprobs: list[list[tuple[int, float]]] | None
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second of decoding; the first token comes from prefill and is not counted."""
        return (len(self.token_ids) - 1) / self.seconds["decode"] if self.seconds["decode"] else 0.0

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
            (`fps`, `max_frames`, ...); `allow_remote` allows http(s):// references.

        Returns:
          The answer, or an iterator over its pieces.

        Raises:
          InputError: Media that cannot be read, an unknown or invalid setting, or a prompt that exceeds the context.
        """
        if messages is None:
            messages = conversation(question, images=images, videos=videos, system=system)
        elif question or system or _several(images, 3) or _several(videos, 4):
            raise InputError("messages hold the question, the media and the system prompt; leave the others out")
        if stream:
            return self._stream(messages, settings)
        return self.answer(messages, **settings).text

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
        return self._answers([messages], settings, on_text)[0]

    def answer_batch(self, conversations: Sequence[Messages], **settings: Any) -> list[GenerationOutput]:
        """Answers several conversations in one batch; each output has the seconds of the whole batch."""
        return self._answers(conversations, settings)

    def process(self, messages: Messages, **settings: Any) -> ProcessorOutput:
        """Returns the prompt that `answer` gives to the model.

        Raises:
          InputError: As `chat`.
        """
        return self._process([messages], settings)[0][0]

    def _answers(
        self, conversations: Sequence[Messages], settings: Mapping[str, Any], on_text: Callable | None = None
    ) -> list[GenerationOutput]:
        """Answers conversations; `on_text` is called with the pieces of the first one's text."""
        start, timings = time.perf_counter(), Timings()
        processed, sampling = self._process(conversations, settings)
        if not processed:
            return []
        seconds = {"load": self.load_seconds, "process": time.perf_counter() - start}
        generated = self.engine.generate([prompt.sample for prompt in processed], sampling, timings)
        outputs, streamed = itertools.tee(generated)
        if on_text is not None:
            for piece in self._text_pieces(streamed):
                on_text(piece)
        outputs = list(outputs)
        seconds |= dataclasses.asdict(timings)
        return [self._generation_output(row, prompt, outputs, seconds) for row, prompt in enumerate(processed)]

    def _stream(self, messages: Messages, settings: Mapping[str, Any]) -> Iterator[str]:
        (prompt,), sampling = self._process([messages], settings)
        yield from self._text_pieces(self.engine.generate([prompt.sample], sampling))

    def _process(
        self, conversations: Sequence[Messages], keywords: Mapping[str, Any]
    ) -> tuple[list[ProcessorOutput], SamplingConfig]:
        """Processes the conversations with the settings of an answer; also returns those of decoding."""
        sampling = SamplingConfig(repetition_penalty=self.generation_config.repetition_penalty)
        settings = answer_settings.resolve(keywords, sampling, self.processor.config)
        vocabulary = self.engine.model.config.text.vocab_size
        if settings.sampling.logprobs > vocabulary:
            raise SettingError("logprobs", settings.sampling.logprobs, f"the model has {vocabulary} tokens; give fewer")
        processor = Processor(self.processor.tokenizer, settings.processor, self.processor.on_frame)
        prepared = [self._prepare(messages, settings) for messages in conversations]
        return [processor(turns) for turns in prepared], settings.sampling

    def _prepare(self, messages: Messages, settings: answer_settings.AnswerSettings) -> list[Turn]:
        """Checks a conversation, measures its text, fetches what is remote and allowed, and fills in video options."""
        turns = parse_messages(messages)
        context = self.engine.model.config.text.max_position_embeddings
        texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
        if not self.processor.tokenizer.may_fit(texts, context):
            length = sum(map(len, texts))
            raise InputError(f"{length:,} characters of text exceed the context of {context} tokens; shorten the text")
        policy = RemotePolicy() if settings.allow_remote else None

        def prepared(part: str | MediaPart) -> str | MediaPart:
            if isinstance(part, str):
                return part
            options = {**settings.video, **part.options} if part.kind == "video" else part.options
            return dataclasses.replace(part, source=fetched(part.source, policy), options=options)

        return [Turn(turn.role, [prepared(part) for part in turn.parts]) for turn in turns]

    def _text_pieces(self, outputs: Iterable[DecodeOutput]) -> Iterator[str]:
        """Returns the text of the first row in pieces of whole characters."""
        stop_ids = self.generation_config.stop_ids
        chunks = ([token for token in _valid_tokens(output, 0) if token not in stop_ids] for output in outputs)
        return filter(None, self.processor.tokenizer.stream(chunks))

    def _generation_output(
        self, row: int, processed: ProcessorOutput, outputs: Sequence[DecodeOutput], seconds: dict[str, float]
    ) -> GenerationOutput:
        """Collects the outputs of one row."""
        tokens = [token for output in outputs for token in _valid_tokens(output, row)]
        stopped = bool(tokens) and tokens[-1] in self.generation_config.stop_ids
        logprobs = None
        if outputs[0].logprobs is not None:
            ids, values = (
                np.concatenate([getattr(output, name)[row][output.valid[row]] for output in outputs]).tolist()
                for name in ("logprob_ids", "logprobs")
            )
            logprobs = [
                [(token, round(value, 6)) for token, value in zip(*top, strict=True)]
                for top in zip(ids, values, strict=True)
            ]
        return GenerationOutput(
            text=self.processor.tokenizer.decode(tokens[:-1] if stopped else tokens),
            token_ids=tokens,
            finish_reason="stop" if stopped else "length",
            processed=processed,
            logprobs=logprobs,
            seconds=seconds,
        )


def _valid_tokens(output: DecodeOutput, row: int) -> list[int]:
    """Returns the ids that a row generated, without what follows its stop token."""
    return output.tokens[row][output.valid[row]].tolist()


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


def load(
    source: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: "jax.sharding.Mesh | None" = None,
    quantize: str | None = None,
    token: str | None = None,
    quiet: bool = True,
    on_status: Callable[[str], None] = lambda line: None,
) -> ChatModel:
    """Loads a checkpoint of any format for inference.

    Args:
      source: An Orbax folder, a training workdir, a Hugging Face folder (read in place), or a Hub id.
      dtype: "float32" or "bfloat16", the type of weights and activations; by default float32 on a CPU, else bfloat16.
      mesh: A mesh that shards the parameters over several devices (`vl3_jax.parallel.mesh.make_mesh`).
      quantize: "int8" stores the layers' weights in int8 (see `vl3_jax.model.quantize`).
      token: Access token of a private Hub repository.
      quiet: Whether to hide the progress bar.
      on_status: Called with a line of text before something slow.

    Raises:
      InputError: The checkpoint does not exist, is incomplete, or has no tokenizer.
    """
    import jax

    from vl3_jax import compilation_cache
    from vl3_jax.checkpoint import chat_config, open_source
    from vl3_jax.checkpoint import load as load_checkpoint
    from vl3_jax.model import VideoLLaMA3
    from vl3_jax.model.quantize import quantize_leaf

    compilation_cache.enable()
    start = time.perf_counter()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}: use int8 or leave it out")
    convert = quantize_leaf if quantize else None
    opened = open_source(source, token=token)
    config = chat_config(opened)
    checkpoint = load_checkpoint(opened, dtype=dtype, mesh=mesh, quiet=quiet, convert=convert)
    processor = Processor.from_folder(checkpoint.files)
    generation_config = GenerationConfig.read(checkpoint.files, processor.tokenizer.stop_ids)
    normalisation = {"image_mean": processor.config.image_mean, "image_std": processor.config.image_std}
    vision = dataclasses.replace(config.vision, **normalisation)
    model = VideoLLaMA3(dataclasses.replace(config, vision=vision), dtype=dtype)
    engine = Engine(model, checkpoint.params, generation_config.stop_ids, on_status=on_status, mesh=mesh)
    return ChatModel(engine, processor, generation_config, time.perf_counter() - start)
