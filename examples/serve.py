"""A small web service: upload a film, get the predicted one back. It runs an exported model and needs no PyTorch.

    pip install fastapi uvicorn python-multipart onnxruntime av
    AVFAST_MODEL=model/ uvicorn --app-dir examples serve:app

    curl -F film=@clip.mp4 http://127.0.0.1:8000/predict -o predicted.mp4

The service keeps the first frames and predicts the others from them and the sound. It answers a file that is too large,
too long or no film with a status of 4xx and the reason.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import numpy as np
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.responses import Response

from avfast.errors import InputError
from avfast.media.sound import read_sound
from avfast.media.video_writer import video_writer
from avfast.runtime import Predictor

RATE = 44_100
MAX_BYTES = 20_000_000
MAX_FRAMES = 300


def create_app(model: str | Path, *, max_bytes: int = MAX_BYTES, max_frames: int = MAX_FRAMES) -> FastAPI:
    """The service over an exported model. It refuses films of more bytes, or of more frames at the model's rate."""
    predictor = Predictor(model)
    # an export that does not say how films are read is refused now, not at the first upload
    _ = predictor.input_spec
    # one prediction at a time: it uses all cores, and memory stays that of one film
    turn = threading.Lock()
    app = FastAPI(title="avfast")

    @app.middleware("http")
    async def refuse_large(request: Request, call_next):  # type: ignore[no-untyped-def]
        # before anything is read: a form is kept on disk while it arrives
        stated = request.headers.get("content-length")
        if request.method == "POST" and (stated is None or not stated.isdigit() or int(stated) > max_bytes + 10_000):
            return Response(f"expected a stated length of at most {max_bytes} bytes", status_code=413)
        return await call_next(request)

    @app.post("/predict", response_class=Response)
    def predict(film: UploadFile) -> Response:
        content = film.file.read(max_bytes + 1)
        if not content or len(content) > max_bytes:
            raise HTTPException(413 if content else 422, f"film has {len(content)} bytes, expected 1 to {max_bytes}")
        with tempfile.TemporaryDirectory() as folder, turn:
            source, target = Path(folder) / "film", Path(folder) / "predicted.mp4"
            source.write_bytes(content)
            try:
                _predict_film(predictor, source, target, max_frames)
            except ValueError as error:
                # InputError is one; the file's name here means nothing to the caller
                raise HTTPException(422, str(error).replace(str(source), film.filename or "film")) from None
            return Response(target.read_bytes(), media_type="video/mp4")

    return app


def _predict_film(predictor: Predictor, source: Path, target: Path, max_frames: int) -> None:
    given, film = predictor.input_spec.context_frames, predictor.read(source, max_frames=max_frames)
    if film.frames.shape[1] <= given:
        raise InputError(f"film has {film.frames.shape[1]} frames with sound, expected more than {given}")
    rollout = predictor.predict(film.frames[:, :given], film.sound)
    whole = np.concatenate((film.frames[0, :given], rollout.frames[0]))
    images = (whole * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    heard = read_sound(source, RATE, start=film.start, seconds=len(images) / film.fps)
    with video_writer(target, film.fps, (heard.samples, RATE)) as write:
        for i, image in enumerate(images if images.shape[3] == 3 else images.repeat(3, axis=3)):
            write(image, i / film.fps)


if "AVFAST_MODEL" in os.environ:
    app = create_app(os.environ["AVFAST_MODEL"])
