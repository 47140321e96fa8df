"""automatic-speech-recognition: Whisper and other encoder-decoder models of speech, scored by the text of recordings.

A recording is a WAV file of 8, 16 or 32 bit samples at the rate that the checkpoint's feature extractor expects; of
several channels the mean is taken. Everything else is as in text2text-generation: exact match of the tokens of the
text, and their likelihood.
"""

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.batch import Batch
from billhook.errors import BillhookError
from billhook.images.pixels import processor_of
from billhook.tasks.base import Home
from billhook.tasks.read_rows import ReadRows, source_of
from billhook.tasks.text2text_generation import TextToText, shifted
from billhook.text.objects import DataRow, objects

FORMS = 'FILE.jsonl with lines {"audio": FILE.wav, "text": TEXT}'
_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32}  # of samples, by their bytes


@dataclass(frozen=True)
class SpeechRecognition(TextToText):
    """A batch is {"input_features": float [rows, bands, frames], "decoder_input_ids": ..., "labels": tokens}."""

    protocol: ClassVar[str] = "text of each recording, by the checkpoint's own processor"
    continues_text: ClassVar[bool] = False
    name: str = "automatic-speech-recognition"
    auto_class: str = "AutoModelForSpeechSeq2Seq"

    def batch(self, inputs: Tensor) -> Batch:
        """The model's inputs for features float [rows, bands, frames] without texts."""
        return {"input_features": inputs, "decoder_input_ids": torch.zeros((len(inputs), 1), dtype=torch.int64)}

    def read(self, source: Any, model: PreTrainedModel, home: Home, purpose: str) -> ReadRows:
        """The recordings of a SOURCE."""
        name = source_of(source)
        directory = home.directory_of(model)
        processor = processor_of(directory, home.trust_remote_code, name, "AutoProcessor")
        rate = int(processor.feature_extractor.sampling_rate)

        def pair(row: DataRow) -> Batch:
            sound = samples_of(row.folder / Path(row.text("audio")).expanduser(), rate)
            features = processor(audio=sound, sampling_rate=rate, return_tensors="pt")["input_features"]
            target = processor.tokenizer(row.text("text"))["input_ids"]
            return {"input_features": features, **shifted(model, target)}

        return ReadRows(name, objects(source, purpose, FORMS), pair)


def samples_of(path: Path, rate: int) -> np.ndarray:
    """The samples of a WAV file in [-1, 1], float32; raises BillhookError for another file or another rate."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BillhookError(f"{path} cannot be read as a WAV file ({error}).") from None
    if own != rate or width not in _TYPES:
        found = f"{own} samples a second of {8 * width} bits"
        raise BillhookError(f"{path} has {found}: convert it to {rate} a second of 16 bits.")
    values = np.frombuffer(data, _TYPES[width]).astype("f4").reshape(-1, channels).mean(1)
    scale = float(1 << (8 * width - 1))
    return (values - (scale if width == 1 else 0)) / scale


TASK = SpeechRecognition()
