"""examples/serve.py over HTTP on the loopback: films come back, everything else is refused, memory stays flat."""

from __future__ import annotations

import importlib.util
import io
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avfast.models.avmodel import AVModel

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("onnxruntime")

LIMIT_BYTES, LIMIT_FRAMES = 300_000, 40


def film(frames: int, *, fps: int = 10, sound: bool = True) -> bytes:
    """An mp4 of a moving bright square."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(frames):
            image = np.zeros((64, 64, 3), np.uint8)
            image[20:30, i % 50 : i % 50 + 10] = 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            wave = np.sin(np.arange(frames * 16000 // fps, dtype=np.float32) / 9)[None]
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts = 16000, 0
            container.mux(audio.encode(block))
            container.mux(audio.encode())
    return target.getvalue()


@pytest.fixture(scope="module")
def server(exported: tuple[Path, AVModel]) -> Iterator[str]:
    path = Path(__file__).parents[2] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.create_app(exported[0], max_bytes=LIMIT_BYTES, max_frames=LIMIT_FRAMES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}/predict"
    running.should_exit = True
    thread.join()


def upload(server: str, content: bytes) -> Any:
    return httpx.post(server, files={"film": ("clip.mp4", content)}, timeout=120, trust_env=False)


def bad_uploads() -> dict[str, tuple[bytes, int, str]]:
    good = film(12)
    return {
        "empty": (b"", 422, "0 bytes"),
        "truncated": (good[: len(good) // 2], 422, "clip.mp4"),
        "no film": (b"words " * 100, 422, "clip.mp4"),
        "too large": (b"\0" * (LIMIT_BYTES + 20_000), 413, "at most 300000 bytes"),
        "just too large": (b"\0" * (LIMIT_BYTES + 1), 413, "expected 1 to 300000"),
        "too long": (film(LIMIT_FRAMES + 1), 422, "longer than 40 frames"),
        "too short": (film(5), 422, "expected more than 5"),
        "mute": (film(12, sound=False), 422, "no sound track in it"),
    }


def test_a_film_comes_back(server: str):
    answer = upload(server, film(12))
    assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 10
    assert len(images) == 12 and images[0].shape == (48, 48, 3)
    # the square of 10 of 64 pixels, at its first place
    assert images[0][18, 3].min() > 200 and images[0][18, 30].max() < 40


@pytest.mark.parametrize("name", list(bad_uploads()))
def test_bad_uploads_are_refused_with_the_reason(server: str, name: str):
    content, status, reason = bad_uploads()[name]
    answer = upload(server, content)
    assert answer.status_code == status and reason in answer.text and "\n" not in answer.text.strip()


def memory() -> int:
    """Resident bytes of this process, which the server is a thread of."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_200_mixed_uploads_by_4_clients(server: str):
    good, bad = (film(12), 200), [(content, status) for content, status, _ in bad_uploads().values()]
    jobs = [good] * 100 + [bad[i % len(bad)] for i in range(100)]
    random.Random(0).shuffle(jobs)
    sizes = []

    def run(job: tuple[bytes, int]) -> bool:
        content, status = job
        answered = upload(server, content).status_code == status
        sizes.append(memory())
        return answered

    with ThreadPoolExecutor(4) as clients:
        assert all(clients.map(run, jobs))
    assert max(sizes[100:]) - max(sizes[:100]) < 30e6
