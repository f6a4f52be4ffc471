"""What a kernel of a GPU, or an operator on a CPU, does in a training step, told from its name."""

import re
from collections.abc import Mapping

from benchmarks.results import Kernel, Profile

CONVOLUTIONS = "convolutions"
MATRIX_PRODUCTS = "matrix products"
BATCH_NORM = "BatchNorm"
POINTWISE = "activations and other pointwise"
EPILOGUE = "epilogues: bias, activation, residual"
STANDARDIZATION = "weight standardization"
UPDATE = "clipping and optimizer"
COPIES = "copies, casts, layout"
POOLING = "pooling"
OTHER = "everything else"

CATEGORIES = (
    CONVOLUTIONS, MATRIX_PRODUCTS, BATCH_NORM, POINTWISE, EPILOGUE, STANDARDIZATION, UPDATE, COPIES, POOLING, OTHER,
)  # fmt: skip

# The first pattern that is found somewhere in a name decides. Ours come first; what a compiler has fused is pointwise
# unless it holds statistics or pooling, though its name tells the convolution whose bias it adds; and cuDNN's changes
# of layout come before its convolutions.
PATTERNS = tuple(
    (category, re.compile(pattern))
    for category, pattern in (
        (STANDARDIZATION, r"(?i)standardize"),
        (UPDATE, r"\bnfk::.*\b(clip|step)<|^(clip|clip_parts|sum_parts|step|step_parts)_kernel"),
        (UPDATE, r"nfnets_kernels::(sgd_)?agc_|multi_tensor_apply|aten::_(fused|foreach)_"),
        # The functions of autograd that run ours in place: in a ReLU network those of the epilogues.
        (EPILOGUE, r"nfnets_kernels::(residual|bias_activation)|^(forward|backward|finish)_kernel|\b_InPlace"),
        (POINTWISE, r"nfnets_kernels::\w+_activation|^(elementwise|glu|log_softmax)_kernel"),
        (BATCH_NORM, r"(?i)batch_?norm|\bbn_(fw|bw)"),
        # The mean over positions, as which pooling at the end of a network runs.
        (POOLING, r"(?i)pool|MeanOps|aten::mean|MeanBackward"),
        (COPIES, r"^triton_[a-z]+_fused_(_?(to_copy|clone|copy|view|permute|convert_element_type)_)+\d+$"),
        (POINTWISE, r"^(triton_(poi|red|per|for|mix)|cpp)_fused"),
        (COPIES, r"(?i)nhwcToNchw|nchwToNhwc|transpose|Padding|^mem(cpy|set)|_copy_kernel|CatArray|FillFunctor"),
        (COPIES, r"aten::(copy_|_to_copy|clone|contiguous|cat|fill_|zero_|constant_pad_nd)"),
        (CONVOLUTIONS, r"(?i)conv|fprop|dgrad|wgrad|implicit_gemm|winograd|cudnn"),
        (MATRIX_PRODUCTS, r"(?i)gemm|gemv|nvjet|cutlass|cublas|splitk|aten::(mm|addmm|bmm)\b|triton_tem_fused"),
        (MATRIX_PRODUCTS, r"\b_Pointwise"),  # of autograd too: our convolutions of 1x1 on a CPU
        (POINTWISE, r"elementwise|aten::(mul|add|sub|div|neg|where|clamp|clamp_min|threshold|relu|gelu|silu|sigmoid)"),
    )
)


def category_of_name(name: str) -> str:
    """The category that a name alone tells."""
    return next((category for category, pattern in PATTERNS if pattern.search(name)), OTHER)


def category_of(kernel: Kernel, profile: Profile) -> str:
    """The category of a kernel in a network's step: what clipping and the optimizer launch is theirs.

    Networks without BatchNorm take its kernels to standardize weights, as timm's do.
    """
    if kernel.updating:
        return UPDATE
    found = category_of_name(kernel.name)
    return STANDARDIZATION if found == BATCH_NORM and not profile.batch_norm else found


def by_category(profile: Profile) -> Mapping[str, tuple[float, float]]:
    """Milliseconds and launches of a step by category, for all categories that occur."""
    found: dict[str, tuple[float, float]] = {}
    for kernel in profile.kernels:
        category = category_of(kernel, profile)
        ms, launches = found.get(category, (0.0, 0.0))
        found[category] = ms + kernel.ms, launches + kernel.launches
    return {category: found[category] for category in CATEGORIES if category in found}
