"""TfIdfVectorizer from ONNX, against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import tcompile
from onnx import TensorProto, helper
from onnx_models import small
from tcompile.compiler.errors import UnsupportedModel

#: two 1-grams, three 2-grams, one 3-gram; column 3 belongs to none
POOL = {"pool_int64s": [2, 5, 5, 5, 2, 3, 6, 7, 3, 5, 2], "ngram_counts": [0, 2, 8], "ngram_indexes": [4, 0, 6, 1, 5, 2]}


def vectorizer(dims: list, **attributes: object):
    node = helper.make_node("TfIdfVectorizer", ["x"], ["y"], **{**POOL, **attributes})
    return small([node], {"x": (dims, TensorProto.INT64)}, ["y"], opset=17)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "TF", "min_gram_length": 1, "max_gram_length": 3, "max_skip_count": 0},
        {"mode": "TF", "min_gram_length": 2, "max_gram_length": 2, "max_skip_count": 3},
        {
            "mode": "IDF",
            "min_gram_length": 1,
            "max_gram_length": 3,
            "max_skip_count": 2,
            "weights": [0.5, 2, 3, 5, 7, 11],
            "ngram_indexes": [4, 0, 3, 1, 5, 2],
        },
        {
            "mode": "TFIDF",
            "min_gram_length": 1,
            "max_gram_length": 2,
            "max_skip_count": 1,
            "weights": [0.5, 2, 3, 5, 7, 11],
            "ngram_indexes": [4, 0, 3, 1, 5, 2],
        },
    ],
)
def test_ngrams(attributes: dict) -> None:
    model = vectorizer(["n", "c"], **attributes)
    compiled = tcompile.compile(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in ((4, 13), (2, 40), (3, 2), (1, 1)):
        x = np.random.default_rng(sum(shape)).integers(2, 8, shape)
        np.testing.assert_array_equal(np.asarray(compiled(x)), session.run(None, {"x": x})[0])


def test_one_row() -> None:
    model = vectorizer([9], mode="TF", min_gram_length=1, max_gram_length=3, max_skip_count=1)
    x = np.array([3, 5, 2, 5, 5, 3, 6, 2, 3])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(np.asarray(tcompile.compile(model)(x)), session.run(None, {"x": x})[0])


def test_pools_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="does not fit a pool"):
        tcompile.compile(vectorizer([9], ngram_counts=[0, 2, 7], mode="TF", min_gram_length=1, max_gram_length=2, max_skip_count=0))
