"""GPT-2 as a graph for ONNX Runtime and for OpenVINO, made from a checkpoint's weights.

What an export would give in the end, written down: the operators that the runtimes have for this
model, the last position's logits only, and a cache of keys and values that stays where it is.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

VOCAB, POSITIONS, WIDTH, LAYERS, HEADS, HEAD = 50257, 1024, 768, 12, 12, 64
Array = Any


def write(graph: Any, path: Path) -> None:
    """GPT-2 in the words of a graph: each method takes values and names of weights."""
    x = graph.embed()
    for i in range(LAYERS):
        y = graph.linear(graph.norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        x = graph.add(x, graph.linear(graph.attention(y, i), f"h.{i}.attn.c_proj"))
        y = graph.gelu(graph.linear(graph.norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = graph.add(x, graph.linear(y, f"h.{i}.mlp.c_proj"))
    graph.head(graph.norm(graph.last(x), "ln_f"))
    graph.save(path)


class OnnxGraph:
    """Standard operators, and ONNX Runtime's attention that keeps keys and values in place."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.onnx, np = importlib.import_module("onnx"), importlib.import_module("numpy")
        info, types = self.onnx.helper.make_tensor_value_info, self.onnx.TensorProto
        self.constants = {
            **weights,
            "batch": np.array([1, -1, 3 * WIDTH]),
            "flat": np.array([-1, WIDTH]),
            "end": np.array([-1]),
        }
        self.nodes: list[Any] = []
        names = [f"{kind}{i}" for i in range(LAYERS) for kind in "kv"]
        shape = [1, HEADS, POSITIONS, HEAD]
        self.inputs = [info(name, types.INT64, ["n"]) for name in ("ids", "positions")]
        self.inputs += [info("last", types.INT32, [1]), info("total", types.INT32, [])]
        self.inputs += [info(f"past_{name}", types.FLOAT, shape) for name in names]
        self.outputs = [info("logits", types.FLOAT, [1, VOCAB])]
        self.outputs += [info(name, types.FLOAT, shape) for name in names]

    def op(self, kind: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        outputs = outputs or (f"value{len(self.nodes)}",)
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def embed(self) -> str:
        tokens = self.op("Gather", "wte.weight", "ids")
        return self.add(tokens, self.op("Gather", "wpe.weight", "positions"))

    def add(self, x: str, y: str) -> str:
        return self.op("Add", x, y)

    def linear(self, x: str, name: str) -> str:
        return self.op("Gemm", x, f"{name}.weight", f"{name}.bias")

    def norm(self, x: str, name: str) -> str:
        return self.op("LayerNormalization", x, f"{name}.weight", f"{name}.bias", epsilon=1e-5)

    def gelu(self, x: str) -> str:
        return self.op("Gelu", x, approximate="tanh")

    def attention(self, x: str, i: int) -> str:
        y = self.op(
            "GroupQueryAttention",
            *(self.op("Reshape", x, "batch"), "", "", f"past_k{i}", f"past_v{i}", "last", "total"),
            outputs=(f"attention{i}", f"k{i}", f"v{i}"),
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=HEADS,
        )
        return self.op("Reshape", y, "flat")

    def last(self, x: str) -> str:
        return self.op("Gather", x, "end")

    def head(self, x: str) -> None:
        self.op("Gemm", x, "wte.weight", transB=1, outputs=("logits",))

    def save(self, path: Path) -> None:
        helper, tensor = self.onnx.helper, self.onnx.numpy_helper.from_array
        constants = [tensor(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "gpt2", self.inputs, self.outputs, constants)
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        self.onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


class OpenVINOGraph:
    """Keys and values are variables of the model, in the pattern that OpenVINO fuses."""

    def __init__(self, weights: dict[str, Array]) -> None:
        self.ov, self.np = importlib.import_module("openvino"), importlib.import_module("numpy")
        self.ops = importlib.import_module("openvino.opset13")
        self.weights = {name: self.ops.constant(array) for name, array in weights.items()}
        self.inputs = [
            self.ops.parameter([1, -1], self.np.int64, name="ids"),
            self.ops.parameter([1, -1], self.np.int64, name="positions"),
            self.ops.parameter([-1], self.np.int32, name="beams"),
        ]
        self.assigned: list[Any] = []
        self.mask: Any = None

    def whole(self, *numbers: int) -> Any:
        return self.ops.constant(self.np.array(numbers))

    def embed(self) -> Any:
        axis = self.whole(0)
        tokens = self.ops.gather(self.weights["wte.weight"], self.inputs[0], axis)
        return self.add(tokens, self.ops.gather(self.weights["wpe.weight"], self.inputs[1], axis))

    def add(self, x: Any, y: Any) -> Any:
        return self.ops.add(x, y)

    def linear(self, x: Any, name: str) -> Any:
        product = self.ops.matmul(x, self.weights[f"{name}.weight"], False, False)
        return self.add(product, self.weights[f"{name}.bias"])

    def norm(self, x: Any, name: str) -> Any:
        y = self.ops.mvn(x, self.whole(-1), True, 1e-5, "INSIDE_SQRT")
        y = self.ops.multiply(y, self.weights[f"{name}.weight"])
        return self.add(y, self.weights[f"{name}.bias"])

    def gelu(self, x: Any) -> Any:
        return self.ops.gelu(x, "tanh")

    def heads(self, x: Any) -> Any:
        return self.ops.transpose(
            self.ops.reshape(x, self.whole(0, 0, HEADS, HEAD), True), self.whole(0, 2, 1, 3)
        )

    def cache(self, x: Any, name: str) -> Any:
        """What the variable holds, then the new rows; assigned to it again."""
        ops, beams = self.ops, self.inputs[2]
        shape = ops.concat([ops.shape_of(beams), self.whole(HEADS, 0, HEAD)], 0)
        empty = ops.broadcast(ops.constant(self.np.float32(0)), shape)
        kind = (self.ov.Type.f32, self.ov.PartialShape([-1, HEADS, -1, HEAD]))
        past = ops.gather(ops.read_value(empty, name, *kind), beams, self.whole(0))
        both = ops.concat([past, x], 2)
        self.assigned.append(ops.assign(both, name))
        return both

    def causal(self, keys: Any) -> Any:
        """[1, 1, new, all]: minus infinity where a key comes after its query."""
        if self.mask is None:
            ops = self.ops
            zero, one = ops.constant(0), ops.constant(1)
            total = ops.gather(ops.shape_of(keys), ops.constant(2), zero)
            later = ops.greater(
                ops.range(zero, total, one, "i64"),
                ops.reshape(self.inputs[1], self.whole(1, 1, -1, 1), False),
            )
            self.mask = ops.select(later, *map(ops.constant, self.np.float32([-self.np.inf, 0])))
        return self.mask

    def attention(self, x: Any, i: int) -> Any:
        q, k, v = map(self.heads, self.ops.split(x, self.ops.constant(2), 3).outputs())
        k, v = self.cache(k, f"k{i}"), self.cache(v, f"v{i}")
        y = self.ops.scaled_dot_product_attention(q, k, v, self.causal(k))
        y = self.ops.transpose(y, self.whole(0, 2, 1, 3))
        return self.ops.reshape(y, self.whole(0, 0, WIDTH), True)

    def last(self, x: Any) -> Any:
        return self.ops.gather(x, self.whole(-1), self.whole(1))

    def head(self, x: Any) -> None:
        self.logits = self.ops.matmul(x, self.weights["wte.weight"], False, True)

    def save(self, path: Path) -> None:
        results = [self.ops.result(self.logits)]
        model = self.ov.Model(results, self.assigned, self.inputs, "gpt2")
        self.ov.save_model(model, path, compress_to_fp16=False)
