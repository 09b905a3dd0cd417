"""Give an engine the weights of another model of the same graph, in seconds and not in minutes.

Untested on a GPU.
"""

import hashlib
from typing import Any

from geodeploy.errors import require
from geodeploy.runtime.graph import OnnxFile


def graph_hash(file: OnnxFile) -> str:
    """Of the graph in ``file`` but its weights: the same for models of one architecture.

    Single numbers count, and so do integers: TensorRT builds such constants into its kernels.
    """
    require("tensorrt", ("onnx",))
    import onnx
    from onnx import TensorProto

    weights = {
        TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8,
        TensorProto.UINT8,
    }  # fmt: skip
    model = onnx.load_from_string(file.content)
    del model.metadata_props[:]
    for tensor in model.graph.initializer:
        if tensor.data_type in weights and len(tensor.dims):
            bare = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(bare)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def refit(trt: Any, engine: Any, file: OnnxFile) -> bool:
    """Give ``engine``, built to be refitted, the weights of ``file``; whether it took all of them.

    ``trt`` is what `geodeploy.runtime.plan.import_tensorrt` gives. What did not take them is of no use.
    """
    log = trt.Logger(trt.Logger.ERROR)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    return bool(parser.refit_from_bytes(file.content, str(file.path)) and refitter.refit_cuda_engine())
