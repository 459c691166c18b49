"""Break the library in many ways, one at a time, and see whether the tests notice.

    python tests/mutants.py [names...] [--jobs N]

For each mutant below the tree is copied, the text `old` is replaced by `new`, and the few tests that
should notice run on the copy. A mutant is caught when one of them fails, or when they hang. It survives when all pass.
It is broken, which counts as little, when the copy does not get as far as a wrong result: tests that cannot be
collected, a name that does not exist, a process that dies. Exits with 1 unless every mutant is caught.

A name may be the beginning of several. Tests of mutants with `emulated`, whose effect the interpreter cannot show, run
with `--emulate sm_90`.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds that the tests of a mutant may take
WRONG_PACKAGE = 99

# Processes that begin with what takes long to import, but not with Triton, which is imported as interpreter or compiler.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "numpy", "torch", "torch.testing"])

KERNELS = "dlu_triton/ops/_kernels.py"
CAM_KERNELS = "dlu_triton/ops/_cam_kernels.py"
REASSEMBLY = "dlu_triton/ops/_reassembly.py"
REGISTRATION = "dlu_triton/ops/_registration.py"
GRAPH = "dlu_triton/ops/_graph.py"
SHARDING = "dlu_triton/ops/_sharding.py"
CARAFE = "dlu_triton/ops/carafe.py"
DLU = "dlu_triton/ops/dlu.py"
CAM = "dlu_triton/ops/cam.py"
LAUNCH = "dlu_triton/_launch.py"
REFERENCE = "dlu_triton/reference.py"
MODULES = "dlu_triton/modules.py"
EXPLAIN = "dlu_triton/explain.py"
CAPTURE = "dlu_triton/_capture.py"
METRICS = "dlu_triton/metrics.py"
COMPLEXITY = "dlu_triton/_complexity.py"
CHECKS = "dlu_triton/_checks.py"
OPENMMLAB = "dlu_triton/integrations/openmmlab.py"


class Mutant(NamedTuple):
    """One change, and tests in `tests/` any of which is to fail for it."""

    name: str
    file: str
    old: str  # is there once
    new: str
    tests: tuple[str, ...]
    emulated: bool = False  # whether only compiled kernels show it


def against_float64(operator: str, case: str, dtype: str = "float64") -> str:
    return f"test_operators.py::test_error_against_float64[{operator}-{case}-{dtype}]"


def by_hand(test: str) -> str:
    return f"test_by_hand.py::{test}"


SHIFTS = by_hand("test_carafe_one_hot_mask_is_a_shift")
CLAMP = by_hand("test_clamp_and_its_gradient")
STATE = "test_devices.py::test_calls_draw_no_random_number_and_change_no_setting"
OFFSETS = by_hand("test_offset_channels_are_x_then_y_within_each_group")

# fmt: off
MUTANTS = (
    # Taps and windows
    Mutant("taps transposed in the band", KERNELS, "u * KERNEL + v, TAPS", "v * KERNEL + u, TAPS", (SHIFTS,)),
    Mutant("taps of the band off by one", KERNELS, "u * KERNEL + v, TAPS", "u * KERNEL + v - 1, TAPS", (SHIFTS,)),
    Mutant(
        "taps past the last column", KERNELS,
        "(v >= 0) & (v < KERNEL)", "(v >= 0) & (v <= KERNEL)",
        (by_hand("test_dlu_with_zero_offsets_averages_under_flat_logits"),),
    ),
    Mutant(
        "no padding tap where an output does not reach", KERNELS,
        "+ v, TAPS - 1)", "+ v, 8)",
        (by_hand("test_dlu_with_zero_offsets_averages_under_flat_logits"),),
    ),
    Mutant(
        "taps transposed in their gradient", KERNELS,
        "tap // KERNEL * WINDOW_W + tap % KERNEL", "tap % KERNEL * WINDOW_W + tap // KERNEL",
        (by_hand("test_carafe_gradients"),),
    ),
    Mutant(
        "window starts at an even column, taps do not know", KERNELS,
        "local % BLOCK_W // SCALE + KERNEL // 2 % 2", "local % BLOCK_W // SCALE",
        (SHIFTS,),
    ),
    Mutant(
        "window start rounded towards zero", KERNELS,
        ">> 1) * 2  # no remainder below zero\n    if", "/ 2).to(tl.int32) * 2\n    if",
        (SHIFTS,),
    ),
    Mutant(
        "window of the gradient a row too low", KERNELS,
        "corner = (rows // SCALE - KERNEL // 2 - window_y)", "corner = (rows // SCALE + 1 - KERNEL // 2 - window_y)",
        (by_hand("test_carafe_gradients"),),
    ),
    Mutant(
        "border replicated instead of padded with zeros", KERNELS,
        "tl.where(inside, window_rows, WINDOW_H + BLOCK_H)", "window_rows",
        ("test_operators.py::test_forward_at_tiles_and_widths[2-20-64-contiguous-float32]",),
    ),
    Mutant(
        "border of channels_last replicated in the gradient of masks", KERNELS,
        "(window_rows >= 0) & (window_rows < height) & (index", "(window_rows < height) & (index",
        (by_hand("test_carafe_gradients"), against_float64("carafe", "channels_last")),
    ),
    # Coordinates and offsets
    Mutant(
        "far border a pixel early", KERNELS,
        "position >= limit, limit, 0.0", "position >= limit, limit - 1, 0.0",
        (CLAMP,),
    ),
    Mutant(
        "near border a pixel late", KERNELS,
        "position >= limit, limit, 0.0", "position >= limit, limit, 1.0",
        (CLAMP,),
    ),
    Mutant("gradient on the near border", KERNELS, "inside = (position > 0)", "inside = (position >= 0)", (CLAMP,)),
    Mutant(
        "left-hand derivative at pixels", KERNELS,
        "low = tl.floor(clamped)", "low = tl.maximum(tl.ceil(clamped) - 1, 0.0)",
        (CLAMP,),
    ),
    Mutant(
        "NaN offset forgotten", KERNELS,
        "tl.where(position == position, clamped - low, position)", "clamped - low",
        ("test_operators.py::test_hostile_offset[nan-kernels]",),
    ),
    Mutant(
        "coordinates in half precision", KERNELS,
        "_clamped_coordinate((cols // SCALE).to(ACC) + dx, width)",
        "_clamped_coordinate(((cols // SCALE).to(ACC) + dx).to(tl.float16).to(ACC), width)",
        ("test_operators.py::test_far_coordinates_keep_their_fraction_in_half_precision",),
    ),
    Mutant(
        "coordinates from output pixels not rounded down", KERNELS,
        "(cols // SCALE).to(ACC) + dx", "cols.to(ACC) / SCALE + dx",
        (OFFSETS,),
    ),
    Mutant(
        "dx and dy swapped", KERNELS,
        "dx_ptrs, dx_ptrs + next_channel", "dx_ptrs + next_channel, dx_ptrs",
        (OFFSETS,),
    ),
    Mutant(
        "offsets of the next group", KERNELS,
        "image * stride_n + 2 * group", "image * stride_n + group",
        (OFFSETS,),
    ),
    Mutant(
        "pixel shuffle by columns first", KERNELS,
        "rows % SCALE * SCALE + cols % SCALE", "cols % SCALE * SCALE + rows % SCALE",
        (OFFSETS, by_hand("test_carafe_upsample_shuffles_then_normalises")),
    ),
    Mutant(
        "shuffled taps too close", KERNELS,
        "tl.full([], SCALE * SCALE, INDEX)", "tl.full([], SCALE, INDEX)",
        (by_hand("test_carafe_upsample_shuffles_then_normalises"),),
    ),
    Mutant(
        "weights of two corners swapped", KERNELS,
        "* ((1 - fy) * fx)[:, None]", "* (fy * (1 - fx))[:, None]",
        (by_hand("test_sampling_between_pixels"),),
    ),
    Mutant(
        "derivative by dx ignores fy", KERNELS,
        "(c01 - c00) * (1 - fy) + (c11 - c10) * fy", "c01 - c00",
        (against_float64("expand_kernels", "groups"),),
    ),
    Mutant(
        "gradient of held coordinates", KERNELS,
        "grad_dy = tl.where(moves_y & valid,", "grad_dy = tl.where((moves_y | moves_x) & valid,",
        (against_float64("expand_kernels", "far offsets"), against_float64("expand_kernels", "one group per channel")),
    ),
    # Strides, groups and slices
    Mutant(
        "row and column strides swapped", KERNELS,
        "rows.to(INDEX) * stride_h + cols.to(INDEX) * stride_w",
        "rows.to(INDEX) * stride_w + cols.to(INDEX) * stride_h",
        (by_hand("test_sampling_between_pixels"),),
    ),
    Mutant(
        "row and column strides of features swapped", KERNELS,
        "offsets = (rows * stride_h + inside * stride_w)[:, None]",
        "offsets = (rows * stride_w + inside * stride_h)[:, None]",
        ("test_operators.py::test_layout_changes_no_value[carafe-sliced]",),
    ),
    Mutant(
        "masks of the first image for all", KERNELS,
        "kernels_ptr += image * stride_kn +", "kernels_ptr +=",
        (against_float64("carafe", "channels_last"),),
    ),
    Mutant(
        "features of the first image for all, channels innermost", KERNELS,
        "features_ptr + image * stride_n * UNIT + _unsigned(offsets)", "features_ptr + _unsigned(offsets)",
        (against_float64("carafe", "channels_last"),),
    ),
    Mutant(
        "kernel space of the first group for all", KERNELS,
        "space_ptr + (image * groups + group) *", "space_ptr + (image * groups) *",
        (OFFSETS, against_float64("dlu_upsample", "groups")),
    ),
    Mutant(
        "gradients of masks to the first group", KERNELS,
        "grad_kernels_ptr += image * stride_mn + group.to(tl.int64) * stride_mg",
        "grad_kernels_ptr += image * stride_mn",
        (against_float64("carafe", "groups"),),
    ),
    Mutant(
        "part of a group forgets blocks_per_program", KERNELS,
        "first_channel = part * blocks_per_program * BLOCK_C", "first_channel = part * BLOCK_C",
        ("test_operators.py::test_channels_shared_between_programs[carafe]",),
    ),
    Mutant(
        "last block of channels skipped where it is not full", KERNELS,
        "range(first_channel, last_channel, BLOCK_C)", "range(first_channel, last_channel - BLOCK_C + 1, BLOCK_C)",
        ("test_operators.py::test_channels_that_fit_no_block[33-1]",),
    ),
    Mutant(
        "block of channels past its group", KERNELS,
        "+ block + tl.arange(0, BLOCK_C)  # [C]\n        # In runs, for the compiler to see that neighbours are present or not together.\n        present = block // RUN + tl.arange(0, BLOCK_C) // RUN <",
        "+ block + tl.arange(0, BLOCK_C)  # [C]\n        present = block // RUN + tl.arange(0, BLOCK_C) // RUN <=",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "channels of the gradient past their group", KERNELS,
        "present = block // RUN + tl.arange(0, BLOCK_C) // RUN < channels_per_group // RUN  # [C]",
        "present = block // RUN + tl.arange(0, BLOCK_C) // RUN <= channels_per_group // RUN  # [C]",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "products sum over channels of the next group", KERNELS,
        "present = block // RUN + channels // RUN < channels_per_group // RUN",
        "present = block // RUN + channels // RUN <= channels_per_group // RUN",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "taps loaded without a mask", KERNELS,
        "_load(plane_ptr + _unsigned(offsets), _both(valid, taps < KERNEL * KERNEL)).to(ACC)",
        "_load(plane_ptr + _unsigned(offsets), None).to(ACC)",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "rows of the window not held to the image", KERNELS,
        "tl.where(rows < height, rows, height - 1)", "rows",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "pairs of columns one pair past the row", KERNELS,
        "width // 2 - 1\n", "width // 2\n",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "outputs past the last column read", KERNELS,
        "last = output_width // GRAD_UNIT - 1", "last = output_width // GRAD_UNIT",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "outputs past the last row read", KERNELS,
        "inside_rows = tl.where(rows < output_height, rows, output_height - 1)", "inside_rows = rows",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "masked load without a value for the rest", KERNELS,
        "tl.load(pointers, mask=mask, other=0.0)", "tl.load(pointers, mask=mask)",
        ("test_operators.py::test_masked_loads_say_what_is_there_instead",),
    ),
    Mutant(
        "tile writes a column too many", KERNELS,
        "inside = (rows < height) & (cols < width)", "inside = (rows < height) & (cols <= width)",
        ("test_operators.py::test_forward_at_tiles_and_widths[2-19-24-contiguous-float32]",),
    ),
    Mutant(
        "tile writes a row too many", KERNELS,
        "inside = (rows < height) & (cols < width)", "inside = (rows <= height) & (cols < width)",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    Mutant(
        "tile writes a run too many", KERNELS,
        "% (BLOCK_W // VECTOR) < width // VECTOR", "% (BLOCK_W // VECTOR) <= width // VECTOR",
        ("test_operators.py::test_forward_at_tiles_and_widths[2-18-66-contiguous-float32]",),
    ),
    Mutant(
        "gradients of taps written past the last column", KERNELS,
        "masks_ptr, pixel_offsets, stride_mt, taps.to(masks_ptr.dtype.element_ty), valid,",
        "masks_ptr, pixel_offsets, stride_mt, taps.to(masks_ptr.dtype.element_ty), rows < height * SCALE,",
        ("test_operators.py::test_nothing_outside_is_touched",),
    ),
    # Softmax
    Mutant(
        "softmax without its maximum", KERNELS,
        "tl.exp(logits - largest[:, None])", "tl.exp(logits)",
        ("test_operators.py::test_softmax_of_large_logits",),
    ),
    Mutant(
        "maximum over the padding too", KERNELS,
        'tl.where(real, logits, float("-inf"))', "logits",
        ("test_operators.py::test_softmax_of_large_logits",),
    ),
    Mutant(
        "padding takes part in the softmax", KERNELS,
        "tl.where(real, tl.exp(logits - largest[:, None]), 0.0)", "tl.exp(logits - largest[:, None])",
        (by_hand("test_dlu_with_zero_offsets_averages_under_flat_logits"),),
    ),
    Mutant(
        "softmax over pixels", KERNELS,
        "powers / tl.sum(powers, axis=1)[:, None]", "powers / tl.sum(powers, axis=0)[None, :]",
        (by_hand("test_dlu_with_zero_offsets_averages_under_flat_logits"),),
    ),
    Mutant(
        "adjoint of softmax without the taps", KERNELS,
        "_sum_of_products(taps, grad_taps)", "tl.sum(grad_taps, axis=1)",
        (against_float64("expand_kernels", "groups"),),
    ),
    Mutant(
        "sums of products that differ between lanes", KERNELS,
        "tl.sum(a * b + 0.0, axis=1)", "tl.sum(a * b, axis=1)",
        ("test_higher_order.py::test_gradgradcheck[2 groups-expand_kernels]",),
        emulated=True,  # interpreted programs have one thread
    ),
    Mutant(
        "cells touched by sums that differ between lanes", KERNELS,
        "tl.max(weights, axis=1) > 0", "tl.sum(weights, axis=1) != 0",
        (against_float64("expand_kernels", "groups", "float32"),),
        emulated=True,
    ),
    Mutant(
        "adjoint of softmax forgotten for logits", KERNELS,
        "tl.where(valid[:, None], _softmax_adjoint(taps, grad_taps), 0.0)",
        "tl.where(valid[:, None], taps * grad_taps, 0.0)",
        (against_float64("carafe_upsample", "groups"),),
    ),
    # Outputs that are cut off
    Mutant(
        "offsets of what is cut off keep what was there", KERNELS,
        "present = (rows < height * SCALE) & (cols < width * SCALE)", "present = valid",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-dlu_upsample-odd]",),
    ),
    Mutant(
        "logits of what is cut off keep what was there", KERNELS,
        "            valid = (rows < height * SCALE) & (cols < width * SCALE)  # also", "            pass  # also",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-carafe_upsample-odd]",),
    ),
    Mutant(
        "logits of what is cut off take their neighbours' gradient", KERNELS,
        "tl.where(valid[:, None], _softmax_adjoint(taps, grad_taps), 0.0)", "_softmax_adjoint(taps, grad_taps)",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-carafe_upsample-odd]",),
    ),
    Mutant(
        "kernels that are not finite reach what is cut off", KERNELS,
        "grad_dx = tl.where(moves_x & valid,", "grad_dx = tl.where(moves_x,",
        ("test_output_size.py::test_nothing_comes_of_what_is_cut_off[kernels-dlu_upsample]",),
    ),
    Mutant(
        "tiles that are cut off as a whole keep what was there", REASSEMBLY,
        "whole = logits or grad_offsets is not None", "whole = False",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-dlu_upsample-small]",),
    ),
    Mutant(
        "tiles of sampled kernels that are cut off as a whole keep what was there", DLU,
        'if "grad_offsets" in named else grad_masks.shape[2:]', "if False else grad_masks.shape[2:]",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-expand_kernels-small]",),
    ),
    Mutant(
        "runs of outputs that do not divide the width", REASSEMBLY,
        "0 if not layout.even or output.shape[3] % short_run else", "0 if not layout.even else",
        ("test_output_size.py::test_is_the_first_part_of_all[kernels-dlu_upsample-odd]",),
    ),
    Mutant(
        "strips as if nothing was cut off below", KERNELS,
        "- RADIUS + output_height // SCALE - strip_y, 0)", "- RADIUS + height - strip_y, 0)",
        ("test_output_size.py::test_gradient_of_wide_features",),
    ),
    Mutant(
        "strips as if nothing was cut off to the right", KERNELS,
        "+ PIECES_W * BLOCK_W <= output_width)", "+ PIECES_W * BLOCK_W <= width * SCALE)",
        ("test_output_size.py::test_gradient_of_wide_features",),
    ),
    Mutant(
        "products for tiles that are cut off", KERNELS,
        "tl.where((y < output_height) & (x < output_width), channels_per_group, 0)", "channels_per_group",
        ("test_output_size.py::test_tiles_that_are_cut_off_take_no_products",),
    ),
    Mutant(
        "what is cut off may have any number", CHECKS,
        "if max(scale * h, scale * w) > MAX_SIZE:", "if False:",
        ("test_output_size.py::test_what_is_cut_off_is_numbered_too",),
    ),
    Mutant(
        "a CPU's compiler computes what is cut off", GRAPH,
        "x if output_size is None or not _fused() else", "x if True else",
        ("test_output_size.py::test_compiled_on_a_cpu",),
    ),
    Mutant(
        "any size taken", CHECKS,
        "if not (1 <= height <= scale * h and 1 <= width <= scale * w):", "if not (1 <= height and 1 <= width):",
        ("test_checks.py",),
    ),
    Mutant(
        "reference: the size forgotten", REFERENCE,
        "x if output_size is None else x[..., : output_size[0], : output_size[1]]", "x",
        ("test_output_size.py::test_is_the_first_part_of_all[twin-carafe_upsample-odd]",),
    ),
    Mutant(
        "the size forgotten on a CPU's compiler", GRAPH,
        "_cut(sums.reshape(n, c, s * h, s * w), output_size)", "sums.reshape(n, c, s * h, s * w)",
        ("test_output_size.py::test_compiled_on_a_cpu",),
    ),
    # Precision
    Mutant(
        "partial sums of the masks' gradient rounded", KERNELS,
        "grad_band = _multiply_add(grad_output, tl.trans(features), grad_band, PRECISION, ACC)",
        "grad_band = _multiply_add(grad_output, tl.trans(features), grad_band, PRECISION, ACC).to(features_ptr.dtype.element_ty).to(ACC)",
        ("test_operators.py::test_long_sums_in_half_precision[carafe-1024 channels, float32 kernels-float16]",),
    ),
    Mutant(
        "sums in half precision", LAUNCH,
        "return torch.float64 if dtype == torch.float64 else torch.float32", "return dtype",
        ("test_operators.py::test_gradients_of_float16_beyond_its_range",),
    ),
    Mutant(
        "kernel space stored in bfloat16", LAUNCH,
        "return torch.float16 if dtype in (torch.float16, torch.bfloat16) else dtype", "return dtype",
        ("test_operators.py::test_sampled_bfloat16_kernels_are_rounded_once",),
    ),
    *(
        Mutant(
            f"normalised kernels rounded in the backward pass of {operator}", DLU,
            f"_launch.sum_dtype(kernel_space.dtype), zeros=grad_space)\n{next_line}",
            f"_launch.space_dtype(kernel_space.dtype), zeros=grad_space)\n{next_line}",
            (f"test_operators.py::test_gradients_of_offsets_between_similar_kernels[{operator}-bfloat16-float32-1e-05]",),
        )
        for operator, next_line in (("dlu_upsample", "        if wants"), ("expand_kernels", "    sums"))
    ),
    Mutant(
        "one TF32 product instead of three", KERNELS,
        "c = tl.dot(a_low, b_high, c,", "c = tl.dot(a_low - a_low, b_high, c,",
        (against_float64("carafe", "groups", "float32"),),
    ),
    Mutant("TF32 parts cut instead of rounded", KERNELS, "+ 0x1000)", "+ 0)", ("test_operators.py::test_tf32_parts",)),
    Mutant(
        "TF32 without being asked", LAUNCH,
        'fp32_precision == "tf32" else "tf32x3"', 'fp32_precision == "tf32" else "tf32"',
        ("test_operators.py::test_tf32_only_where_the_user_allows_it",),
    ),
    Mutant(
        "TF32 in sums that only add up", LAUNCH,
        'dtype == torch.float64 else "tf32x3"', 'dtype == torch.float64 else "tf32"',
        ("test_operators.py::test_tf32_only_where_the_user_allows_it",),
    ),
    Mutant(
        "TF32 in the forward pass", KERNELS,
        "output = _multiply_add(tl.trans(features), tl.trans(band), output, PRECISION, ACC)",
        'output = _multiply_add(tl.trans(features), tl.trans(band), output, "tf32", ACC)',
        (against_float64("carafe", "groups", "float32"),),
        emulated=True,  # NumPy multiplies float32 whatever the precision
    ),
    Mutant(
        "TF32 in the gradient of the features", KERNELS,
        "above = _multiply_add(grad_output, band, above, PRECISION, ACC)",
        'above = _multiply_add(grad_output, band, above, "tf32", ACC)',
        (against_float64("carafe", "groups", "float32"),),
        emulated=True,
    ),
    Mutant(
        "TF32 in the sums of samples", KERNELS,
        "sums = _multiply_add(weights, grad_taps, sums, PRECISION, ACC)",
        'sums = _multiply_add(weights, grad_taps, sums, "tf32", ACC)',
        (against_float64("expand_kernels", "groups", "float32"),),
        emulated=True,
    ),
    # Shared memory
    Mutant(
        "tiles for more shared memory than a GPU has", LAUNCH,
        '["max_shared_mem"] * 3 // 4', '["max_shared_mem"] * 4',
        ("test_compiled.py::test_kernels_of_every_size_and_scale_have_enough_shared_memory",),
    ),
    Mutant(
        "operands of half precision that are not widened before sm_80", LAUNCH,
        "return most // 2 if widened else most", "return most",
        ("test_compiled.py::test_kernels_of_every_size_and_scale_have_enough_shared_memory",),
    ),
    # What the compiler is told; the interpreter takes no notice, and reads element by element
    Mutant(
        "launches repeated for tensors that are less aligned", LAUNCH,
        "t.data_ptr() % 16)", "0)",
        ("test_operators.py::test_views_of_one_shape_that_begin_elsewhere[carafe]",),
        emulated=True,
    ),
    Mutant(
        "pixels said to begin at 16 bytes", KERNELS,
        "features_ptr + image * stride_n * UNIT + _unsigned(offsets), None",
        "tl.multiple_of(features_ptr + image * stride_n * UNIT + _unsigned(offsets), [1, 16]), None",
        ("test_operators.py::test_runs_of_views[carafe-apart]",),
        emulated=True,
    ),
    Mutant(
        "runs of channels said to be whole", KERNELS,
        "features_ptr + image * stride_n * UNIT + _unsigned(offsets), None if present is None else present[None, :]",
        "tl.multiple_of(features_ptr + image * stride_n * UNIT + _unsigned(offsets), [1, 16]), tl.max_constancy(present[None, :], [1, 4])",
        ("test_operators.py::test_runs_of_odd_numbers_of_channels[7-1]",),
        emulated=True,
    ),
    # Gradients of the kernel space
    Mutant(
        "sums of samples added by loads and stores", KERNELS,
        "_add_to_cells(\n                    plane_ptr, cells_y, cells_x, height, width, sums, touched, count_bits, KERNEL, TAPS, INDEX\n                )",
        "places = plane_ptr + _cell_offsets(cells_y, cells_x, width, TAPS, INDEX)\n"
        "                before = tl.load(places, mask=touched[:, None], other=0)\n"
        "                tl.store(places, before + sums.to(before.dtype), mask=touched[:, None])",
        ("test_deterministic.py::test_dlu_repeats_itself_on_request[spread-dlu_upsample]",),
        emulated=True,  # interpreted programs run one after the other
    ),
    Mutant(
        "atomic additions replaced by stores", KERNELS,
        'tl.atomic_add(plane_ptr + offsets, gradients, mask=mask, sem="relaxed")',
        "tl.store(plane_ptr + offsets, gradients, mask=mask)",
        (against_float64("expand_kernels", "groups"),),
    ),
    Mutant(
        "last taps not added", KERNELS,
        "(KERNEL * KERNEL + 3) // 4", "KERNEL * KERNEL // 4",
        (against_float64("expand_kernels", "groups"),),
    ),
    Mutant(
        "window of cells loses samples at its end", KERNELS,
        "(x1 < window_x + CELLS)", "(x0 < window_x + CELLS)",
        ("test_operators.py::test_samples_around_the_window_of_cells",),
    ),
    Mutant(
        "window of cells loses samples before it", KERNELS,
        "(y0 >= window_y) & (y1", "(y1 >= window_y) & (y1",
        ("test_operators.py::test_samples_around_the_window_of_cells",),
    ),
    Mutant(
        "samples counted in the window and beside it", KERNELS,
        "apart = valid & ~inside", "apart = valid",
        ("test_operators.py::test_samples_around_the_window_of_cells",),
    ),
    Mutant(
        "samples beside the window lost", KERNELS,
        "apart = valid & ~inside", "apart = inside & ~inside",
        ("test_operators.py::test_samples_around_the_window_of_cells",),
    ),
    Mutant(
        "infinite gradients spread over the window", KERNELS,
        'inside &= tl.abs(total) < float("inf")', "inside &= True",
        ("test_operators.py::test_what_is_not_finite_reaches_only_what_it_weighs",),
    ),
    Mutant(
        "NaN offsets spread over the window", KERNELS,
        "inside &= valid & (fy == fy) & (fx == fx)", "inside &= valid",
        ("test_operators.py::test_what_is_not_finite_reaches_only_what_it_weighs",),
    ),
    Mutant(
        "sums not set to zero", DLU,
        "zeros[0] if zeros else None", "None",
        (against_float64("expand_kernels", "groups"),),
    ),
    Mutant(
        "additions in any order where they must not be", DLU,
        "return not torch.are_deterministic_algorithms_enabled()", "return True",
        ("test_deterministic.py::test_dlu_repeats_itself_on_request[one-dlu_upsample]",),
    ),
    Mutant(
        "fixed point without room for the number of terms", KERNELS,
        "power = 61 - count_bits", "power = 61",
        ("test_deterministic.py::test_gradients_of_any_magnitude[0-torch.float32]",),
    ),
    Mutant(
        "terms counted by source pixels", DLU,
        "(scale_factor**2 * h * w - 1).bit_length()", "(h * w - 1).bit_length()",
        ("test_deterministic.py::test_as_many_terms_as_there_are_outputs",),
    ),
    Mutant(
        "second integer of float64 forgotten", KERNELS,
        "rest = (gradients - whole.to(tl.float64))", "rest = (gradients - gradients)",
        ("test_deterministic.py::test_small_gradients_beside_a_large_one",),
    ),
    Mutant(
        "infinite gradients become numbers", KERNELS,
        "field == 2 * BIAS + 1", "field == 2 * BIAS + 2",
        ("test_deterministic.py::test_what_is_not_finite_is_seen[grad_output-inf]",),
    ),
    Mutant(
        "NaN offsets become numbers", KERNELS,
        "mask=unknown > 0", "mask=unknown > 1",
        ("test_deterministic.py::test_what_is_not_finite_is_seen[offsets-nan]",),
    ),
    # Gradients of the features
    Mutant(
        "steps past the last row taken as inside", KERNELS,
        "output_height // SCALE - strip_y, 0) // STEP_H", "output_height // SCALE - strip_y, 0) // STEP_H + 1",
        ("test_operators.py::test_features_gradient_of_wide_maps",),
    ),
    Mutant(
        "steps before the first row taken as inside", KERNELS,
        "2 * STEP_H - 1 - RADIUS - strip_y", "STEP_H - 1 - RADIUS - strip_y",
        ("test_operators.py::test_features_gradient_of_wide_maps",),
    ),
    Mutant(
        "strips at the left border taken as inside", KERNELS,
        "(strip_x >= RADIUS) & (", "(strip_x >= 0) & (",
        ("test_operators.py::test_features_gradient_of_wide_maps",),
    ),
    Mutant(
        "strips at the right border taken as inside", KERNELS,
        "+ PIECES_W * BLOCK_W <= output_width)", "+ PIECES_W * BLOCK_W <= output_width + RADIUS * SCALE)",
        ("test_operators.py::test_features_gradient_of_wide_maps",),
    ),
    Mutant(
        "last piece forgotten where nothing is masked", KERNELS,
        "first_x, pieces_w = 0, PIECES_H, 0, PIECES_W", "first_x, pieces_w = 0, PIECES_H, 0, PIECES_W - 1",
        ("test_operators.py::test_features_gradient_of_wide_maps",),
    ),
    Mutant(
        "last piece forgotten at the border", KERNELS,
        "(tl.maximum(size - start, 0) + BLOCK - 1) // BLOCK", "tl.maximum(size - start, 0) // BLOCK",
        (against_float64("carafe", "groups"),),
    ),
    Mutant(
        "what a step leaves for the next is lost", KERNELS,
        "above = below\n", "above = tl.zeros_like(below)\n",
        (against_float64("carafe", "groups"),),
    ),
    Mutant(
        "NaN out of reach", KERNELS,
        "taps = tl.where(_both(valid, tl.arange(0, TAPS) < KERNEL * KERNEL), taps, 0.0)", "taps = taps",
        ("test_operators.py::test_nan_offset_reaches_only_the_features_it_weighs[kernels]",),
    ),
    # What the host says to a launch
    Mutant(
        "grid without slices", REASSEMBLY,
        "n * tiles_h * tiles_w * groups * slices, arguments", "n * tiles_h * tiles_w * groups, arguments",
        ("test_operators.py::test_channels_shared_between_programs[carafe]",),
    ),
    Mutant(
        "strips of the feature gradient missing", REASSEMBLY,
        "programs = columns * slices * tiles_h", "programs = columns * slices * max(1, h // (steps * strip.STEP_H))",
        (against_float64("carafe", "groups"), "test_operators.py::test_features_gradient_of_wide_maps"),
    ),
    Mutant(
        "tiles rounded down", REASSEMBLY,
        "_launch.cdiv(size[0], tile.BLOCK_H)", "max(1, size[0] // tile.BLOCK_H)",
        (against_float64("carafe", "groups"),),
    ),
    Mutant(
        "64 bits by batch", LAUNCH,
        "sizes, strides = tensor.shape[1:], tensor.stride()[1:]", "sizes, strides = tensor.shape, tensor.stride()",
        ("test_sizes.py::test_which_images_take_64_bits",),
    ),
    Mutant(
        "64 bits by elements instead of distances", LAUNCH,
        "if sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) >= MOST",
        "if math.prod(sizes) >= MOST",
        ("test_sizes.py::test_which_images_take_64_bits",),
    ),
    Mutant(
        "64 bits never", LAUNCH,
        "                return tl.int64", "                return tl.int32",
        ("test_sizes.py::test_which_images_take_64_bits",),
    ),
    Mutant(
        "rows of odd width read in pairs", LAUNCH,
        "math.gcd(n, c, h, features.shape[3]) % 2 == 0", "math.gcd(n, c, h) % 2 == 0",
        ("test_operators.py::test_which_maps_are_read_in_pairs",),
    ),
    Mutant(
        "runs longer than the width allows", LAUNCH,
        "math.gcd(n, c, h, tensor.shape[3], most, start)", "math.gcd(n, c, h, most, start)",
        ("test_operators.py::test_runs_of_views",),
    ),
    Mutant(
        "runs longer than the batch stride allows", LAUNCH,
        "unit = math.gcd(n, h, w, 16 // features.element_size())",
        "unit = math.gcd(h, w, 16 // features.element_size())",
        ("test_operators.py::test_runs_of_views",),
    ),
    Mutant(
        "repeated launches: dtypes alike", LAUNCH,
        "t.stride(), t.dtype, t.data_ptr()", "t.stride(), t.data_ptr()",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: strides alike", LAUNCH,
        "(t.shape, t.stride(), t.dtype", "(t.shape, t.dtype",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: shapes alike", LAUNCH,
        "(t.shape, t.stride(), t.dtype", "(t.stride(), t.dtype",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: alignment alike", LAUNCH,
        "t.data_ptr() % 16)", "0)",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: settings alike", LAUNCH,
        "tensors[0].device, *settings, *described", "tensors[0].device, *described",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: kernels alike", LAUNCH,
        "key = (prepare, tensors", "key = (tensors",
        ("test_launches.py::test_calls_that_differ_are_told_apart",),
    ),
    Mutant(
        "repeated launches: devices alike", LAUNCH,
        "key = (prepare, tensors[0].device, ", "key = (prepare, ",
        ("test_devices.py::test_launches_go_to_the_device_of_their_tensors",),
    ),
    Mutant(
        "repeated launches: tensors kept", LAUNCH,
        "None if isinstance(argument, Tensor) else argument for", "argument for",
        ("test_launches.py::test_a_call_alike_repeats_its_launches",),
    ),
    Mutant(
        "repeated launches: kept for ever", LAUNCH,
        "        if len(_repeats) >= MOST_REPEATS:\n            _rep",
        "        if len(_repeats) < 0:\n            _rep",
        ("test_launches.py::test_few_launches_are_kept",),
    ),
    # Registration
    Mutant(
        "gradients to the wrong arguments", REGISTRATION,
        "next(gradients) if want else None for want in wanted], *others",
        "next(gradients) if want else None for want in wanted][::-1], *others",
        ("test_operators.py::test_only_wanted_gradients[carafe]",),
    ),
    Mutant(
        "gradient of the features last", DLU,
        "gradients.insert(0, grad_features)", "gradients.append(grad_features)",
        ("test_operators.py::test_only_wanted_gradients[dlu_upsample]",),
    ),
    Mutant(
        "deterministic gradients without the request for offsets", DLU,
        "return space, gradients if grad_offsets is None else [*gradients, grad_offsets]",
        "return space, gradients if grad_offsets is None else [grad_offsets, *gradients]",
        ("test_deterministic.py::test_reference_agrees_that_it_is_the_same_operator",),
    ),
    Mutant(
        "fake gradients contiguous", REGISTRATION,
        "torch.empty_like(tensor) for tensor, want", "tensor.new_empty(tensor.shape) for tensor, want",
        (
            "test_compile.py::test_fake_and_real_results_are_laid_out_alike[(2, 3, 4)-carafe]",
            "test_compile.py::test_fake_and_real_results_are_laid_out_alike",
        ),
    ),
    Mutant(
        "output of the wrong layout", LAUNCH,
        "torch.channels_last if channels_innermost(like) else",
        "torch.contiguous_format if channels_innermost(like) else",
        ("test_operators.py::test_output_keeps_the_memory_format[channels_last]",),
    ),
    Mutant(
        "fake output of the wrong layout", CARAFE,
        "group_size, scale_factor, output_size: _reassembly.new_output(\n        features,",
        "group_size, scale_factor, output_size: _reassembly.new_output(\n        features.contiguous(),",
        ("test_compile.py::test_fake_and_real_results_are_laid_out_alike[(2, 3, 4)-carafe]",),
    ),
    Mutant(
        "vmap over the wrong dimension", REGISTRATION,
        "tensor.movedim(dim, 0)", "tensor.movedim(0, dim)",
        ("test_transforms.py::test_transform[kernels-carafe-vmap of the last]",),
    ),
    Mutant(
        "vmap unfolded the wrong way", REGISTRATION,
        "tensor.unflatten(0, (size, images))", "tensor.unflatten(0, (images, size)).transpose(0, 1)",
        ("test_transforms.py::test_transform[kernels-carafe-vmap]",),
    ),
    Mutant(
        "forward mode by kernels", REGISTRATION,
        "if forward_ad._current_level >= 0:\n            return self.twin(*arguments)",
        "if forward_ad._current_level >= 1:\n            return self.twin(*arguments)",
        ("test_transforms.py::test_transform[kernels-carafe-jvp]",),
    ),
    Mutant(
        "lazy negation not seen", REGISTRATION,
        " or tensor.is_neg()", "",
        ("test_devices.py::test_kinds_of_tensors", "test_devices.py::test_negated_activations"),
    ),
    Mutant(
        "partial sums of a gradient of features rounded", KERNELS,
        "            above = _multiply_add(grad_output, band, above, PRECISION, ACC)\n",
        "            above = _multiply_add(grad_output, band, above, PRECISION, ACC).to(tl.float16).to(ACC)\n",
        ("test_operators.py::test_gradients_of_features_are_rounded_once",),
    ),
    Mutant(
        "tiles that begin inside a pixel not thought of", LAUNCH,
        "misaligned = scale_factor - math.gcd(block, scale_factor)", "misaligned = 0",
        ("test_operators.py::test_every_kernel_size_at_many_scales[3-3]",),
    ),
    Mutant(
        "zeros without memory not seen", REGISTRATION,
        " or tensor._is_zerotensor()", "",
        ("test_devices.py::test_zeros_without_memory",),
    ),
    Mutant(
        "dispatch modes not seen", REGISTRATION,
        "torch._C._len_torch_dispatch_stack() == 0 and ", "",
        ("test_ways.py::test_dispatch_modes_see_one_operator",),
    ),
    Mutant(
        "features not cast in an autocast region", DLU,
        "dlu_upsample_op(_launch.autocast(features)", "dlu_upsample_op(features",
        (
            "test_autocast.py::test_operators_compute_in_the_type_of_the_region" "[kernels-dlu_upsample-bfloat16-float32]",
        ),
    ),
    Mutant(
        "float64 cast in an autocast region", LAUNCH,
        " or tensor.dtype == torch.float64\n", "\n",
        ("test_autocast.py::test_float64_and_what_is_outside_stay_as_they_are",),
    ),
    # FLOPs and parameters
    Mutant(
        "FLOPs of gradients that are not wanted", CARAFE,
        "features, masks, k, groups, s, size, *wanted: (\n        sum(wanted)", "features, masks, k, groups, s, size, *wanted: (\n        2",
        ("test_complexity.py::test_operators_by_hand",),
    ),
    Mutant(
        "FLOPs of an interpolation", COMPLEXITY,
        "return 7 * _outputs", "return 8 * _outputs",
        ("test_complexity.py::test_by_hand", "test_complexity.py::test_published_figures"),
    ),
    Mutant(
        "parameters without a bias", COMPLEXITY,
        "parameters = (c + 1) * cm +", "parameters = c * cm +",
        ("test_complexity.py::test_published_figures",),
    ),
    Mutant(
        "share saved without the interpolation", COMPLEXITY,
        "(dlu.flops + dlu.interpolation_flops) / carafe.flops", "dlu.flops / carafe.flops",
        (
            "test_complexity.py::test_by_hand",
            "test_complexity.py::test_published_figures",
            "test_complexity.py::test_command",
        ),
    ),
    Mutant(
        "FLOPs of several maps", COMPLEXITY,
        "2 * math.prod(weights) * math.prod(activations[2:])", "2 * math.prod(activations)",
        ("test_complexity.py::test_weighted_maps_count_as_the_product_they_are",),
    ),
    # For compilers and exporters
    Mutant(
        "traced: softmax over the outputs of a pixel", GRAPH,
        "_beside(logits, groups, kernel_size, scale_factor).softmax(dim=1)",
        "_beside(logits, groups, kernel_size, scale_factor).softmax(dim=2)",
        ("test_export.py::test_form_for_onnx_is_the_operator",),
    ),
    Mutant(
        "traced: dx and dy swapped", GRAPH,
        "dx, dy = shifts.split", "dy, dx = shifts.split",
        ("test_export.py::test_form_for_onnx_is_the_operator",),
    ),
    Mutant(
        "traced: offsets by pixel", GRAPH,
        ".permute(0, 2, 3, 4, 1)\n    dx", ".permute(0, 2, 4, 3, 1).reshape(n * groups, s * s, h, w, 2)\n    dx",
        ("test_export.py::test_form_for_onnx_is_the_operator",),
    ),
    Mutant(
        "traced: corners at the edges of pixels", GRAPH,
        "(2 * x + 1).to(dtype) / w", "(2 * x).to(dtype) / w",
        ("test_export.py::test_form_for_onnx_is_the_operator",),
    ),
    Mutant(
        "traced: weights of two corners swapped", GRAPH,
        "(1 - fy) * fx, fy * (1 - fx)", "fy * (1 - fx), (1 - fy) * fx",
        ("test_export.py::test_form_for_onnx_is_the_operator",),
    ),
    Mutant(
        "traced: type of the kernels", GRAPH,
        "result.to(given.dtype, memory_format", "result.to(memory_format",
        ("test_export.py::test_form_for_onnx_in_half_precision",),
    ),
    # Reference
    Mutant("reference: taps transposed", REFERENCE, "taps[u * k + v]", "taps[v * k + u]", (SHIFTS,)),
    Mutant(
        "reference: border replicated", REFERENCE,
        "[k // 2] * 4), scale_factor=s)", '[k // 2] * 4, mode="replicate"), scale_factor=s)',
        (SHIFTS,),
    ),
    Mutant(
        "reference: groups interleaved", REFERENCE,
        "nearest.unflatten(1, (g, c // g))", "nearest.unflatten(1, (c // g, g)).transpose(1, 2)",
        (by_hand("test_carafe_groups_take_their_own_masks"),),
    ),
    Mutant(
        "reference: sums in half precision", REFERENCE,
        "    wide = _wide(features.dtype)\n", "    wide = features.dtype\n",
        ("test_operators.py::test_float16_sums_beyond_its_range",),
    ),
    Mutant(
        "reference: softmax over groups", REFERENCE,
        ".softmax(dim=2).flatten(3)", ".softmax(dim=1).flatten(3)",
        (OFFSETS,),
    ),
    Mutant(
        "reference: softmax of logits over groups", REFERENCE,
        ".softmax(dim=2).to(logits.dtype)", ".softmax(dim=1).to(logits.dtype)",
        (by_hand("test_carafe_upsample_shuffles_then_normalises"),),
    ),
    Mutant(
        "reference: dx and dy swapped", REFERENCE,
        "dx, dy = shifts.unbind(2)", "dy, dx = shifts.unbind(2)",
        (OFFSETS,),
    ),
    Mutant(
        "reference: coordinates not rounded down", REFERENCE,
        "dx + torch.arange(cols, device=dx.device) // s, w", "dx + torch.arange(cols, device=dx.device) / s, w",
        (OFFSETS,),
    ),
    Mutant(
        "reference: coordinates in half precision", REFERENCE,
        "shifts = cut(pixel_shuffle(offsets.to(wide), s), size)", "shifts = cut(pixel_shuffle(offsets, s), size)",
        ("test_operators.py::test_far_coordinates_keep_their_fraction_in_half_precision",),
    ),
    Mutant(
        "reference: border a pixel early", REFERENCE,
        "position.detach().clamp(0, size - 1)", "position.detach().clamp(0, max(size - 2, 0))",
        (CLAMP,),
    ),
    Mutant(
        "reference: gradient on the near border", REFERENCE,
        "(position > 0) & (position < size - 1)", "(position >= 0) & (position < size - 1)",
        (CLAMP,),
    ),
    Mutant(
        "reference: left-hand derivative at pixels", REFERENCE,
        "clamped.detach().nan_to_num().floor()", "clamped.detach().nan_to_num().ceil().sub(1).clamp(min=0)",
        (CLAMP,),
    ),
    Mutant(
        "reference: weights of two corners swapped", REFERENCE,
        "corner(y0, x1), weight(1 - fy, fx)", "corner(y0, x1), weight(fy, 1 - fx)",
        (by_hand("test_sampling_between_pixels"),),
    ),
    Mutant(
        "reference: pixel shuffle by columns first", REFERENCE,
        "x.permute(0, 1, 4, 2, 5, 3)", "x.permute(0, 1, 4, 3, 5, 2)",
        (OFFSETS,),
    ),
    Mutant(
        "reference: eps left out", REFERENCE,
        "_ratio((g * a).sum((3, 4)), total + eps)", "_ratio((g * a).sum((3, 4)), total)",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "reference: eps beside the quotient", REFERENCE,
        "_ratio(square, 2 * square + cubes + eps))", "_ratio(square, 2 * square + cubes) + eps)",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "reference: sum of gradients instead of mean", REFERENCE,
        "return g.mean((3, 4))", "return g.sum((3, 4))",
        ("test_cam.py::test_by_hand",),
    ),
    Mutant(
        "reference: LayerCAM as the elementwise method", REFERENCE,
        '"layercam": g.relu() * a', '"layercam": (g * a).relu()',
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "reference: dead channels cancel", REFERENCE,
        "torch.where(magnitude == 0, 1, ", "torch.where(magnitude < 0, 1, ",
        ("test_cam.py::test_cancellation",),
    ),
    Mutant(
        "reference: resized constants normalised", REFERENCE,
        ".masked_fill(constant, 0)", "",
        ("test_cam.py::test_constant_maps_are_zero",),
    ),
    Mutant(
        "reference: corners aligned", REFERENCE,
        "align_corners=False", "align_corners=True",
        ("test_cam.py::test_resize_and_normalisation_by_hand",),
    ),
    Mutant(
        "reference: weights of maps in the region's type", REFERENCE,
        "torch.autocast(device, enabled=False)", "torch.autocast(device, enabled=torch.is_autocast_enabled(device))",
        ("test_cam.py::test_autocast_changes_nothing",),
    ),
    # Class activation maps
    Mutant(
        "NaN lost in ReLU", CAM_KERNELS,
        "tl.where(x < 0, 0.0, x)", "tl.where(x > 0, x, 0.0)",
        ("test_cam.py::test_nan_stays_in_its_image",),
    ),
    Mutant(
        "division by zero", CAM_KERNELS,
        "tl.where(denominator == 0, 0.0, numerator", "tl.where(False, 0.0, numerator",
        ("test_cam.py::test_activations_that_cancel_stay_finite", "test_cam.py::test_dead_channels_and_maps_are_zero"),
    ),
    Mutant(
        "eps added to the sum of gradients", CAM_KERNELS,
        "_ratio(summed, total + tl.full([], EPS, ACC))", "_ratio(summed + tl.full([], EPS, ACC), total)",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "eps outside the quotient", CAM_KERNELS,
        "cubes + tl.full([], EPS, ACC))", "cubes) + tl.full([], EPS, ACC)",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant("Grad-CAM++ without ReLU", CAM_KERNELS, "_relu(g) * _ratio", "g * _ratio", ("test_cam.py::test_by_hand",)),
    Mutant(
        "LayerCAM as the elementwise method", CAM_KERNELS,
        "return _relu(g) * a", "return _relu(g * a)",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "elementwise method as LayerCAM", CAM_KERNELS,
        "return _relu(g * a)", "return _relu(g) * a",
        ("test_golden.py::test_golden_class_activation_map",),
    ),
    Mutant(
        "sum of gradients instead of mean", CAM_KERNELS,
        "summed / tl.full([], pixels, ACC)", "summed",
        ("test_cam.py::test_by_hand",),
    ),
    Mutant(
        "mean over the padding too", CAM_KERNELS,
        "summed / tl.full([], pixels, ACC)", "summed / 16",
        ("test_cam.py::test_by_hand",),
    ),
    Mutant(
        "cancellation without magnitudes", CAM_KERNELS,
        "weight, contribution, total, tl.sum(tl.abs(a), 0)", "weight, contribution, total, tl.abs(tl.sum(a, 0))",
        ("test_cam.py::test_cancellation",),
    ),
    Mutant(
        "cancellation of large planes", CAM_KERNELS,
        "magnitudes += tl.abs(a)", "magnitudes += a",
        ("test_cam.py::test_work_shared_between_programs",),
    ),
    Mutant(
        "channel values of all maps to the first", CAM_KERNELS,
        "(image * classes + k) * channels + channel", "(image + k * 0) * channels + channel",
        ("test_cam.py::test_several_classes_are_a_loop",),
    ),
    Mutant(
        "gradients of the first class for all", CAM_KERNELS,
        "        gradients_ptr += image * stride_gn + k.to(tl.int64) * stride_gk\n\n    summed",
        "        gradients_ptr += image * stride_gn\n\n    summed",
        ("test_cam.py::test_several_classes_are_a_loop",),
    ),
    Mutant(
        "gradients of the first class for all, large planes", CAM_KERNELS,
        "    gradients_ptr += image * stride_gn + k.to(tl.int64) * stride_gk\n\n    total",
        "    gradients_ptr += image * stride_gn\n\n    total",
        ("test_cam.py::test_several_classes_of_large_planes",),
    ),
    Mutant(
        "given weights of the first map for all", CAM_KERNELS,
        "image * stride_wn + k.to(tl.int64) * stride_wk +", "image * stride_wn +",
        ("test_cam.py::test_several_classes_are_a_loop",),
    ),
    Mutant(
        "blocks of channels rounded down", CAM_KERNELS,
        "tl.cdiv(channels, BLOCK_C))", "tl.maximum(channels // BLOCK_C, 1))",
        ("test_cam.py::test_sizes[33-(3, 17)]", "test_cam.py::test_sizes"),
    ),
    Mutant(
        "slice forgets blocks_per_program", CAM_KERNELS,
        "first_block = channel_slice * blocks_per_program", "first_block = channel_slice",
        ("test_cam.py::test_slices_of_several_blocks",),
    ),
    Mutant(
        "run of planes past the last channel", CAM_KERNELS,
        "BLOCK_C if EXACT else min(channels - first, BLOCK_C)", "BLOCK_C",
        ("test_cam.py::test_sizes", "test_cam.py::test_nothing_outside_is_touched"),
    ),
    Mutant(
        "channels past the last", CAM_KERNELS,
        "mask & (channel < channels)[None, :]", "mask & (channel <= channels)[None, :]",
        ("test_cam.py::test_layout_changes_no_value", "test_cam.py::test_nothing_outside_is_touched"),
    ),
    Mutant(
        "planes dealt out without their gaps", CAM_KERNELS,
        "tl.where(p < pixels, c * pixels + p, BLOCK_P * BLOCK_C - 1)",
        "tl.minimum(c * pixels + p, BLOCK_P * BLOCK_C - 1)",
        ("test_cam.py::test_sizes",),
    ),
    Mutant(
        "last pixels of large planes", CAM_KERNELS,
        "    summed = tl.zeros([BLOCK_P, BLOCK_C], ACC)\n    for first in range(0, pixels, BLOCK_P):",
        "    summed = tl.zeros([BLOCK_P, BLOCK_C], ACC)\n    for first in range(0, pixels - BLOCK_P, BLOCK_P):",
        ("test_cam.py::test_work_shared_between_programs",),
    ),
    Mutant(
        "terms of large planes without their sum", CAM_KERNELS,
        "        total = _sum_of_plane(sums, BLOCK_C, BLOCK_P)\n",
        "        total = _sum_of_plane(sums, BLOCK_C, BLOCK_P) * 0\n",
        ("test_cam.py::test_work_shared_between_programs",),
    ),
    Mutant(
        "slices beyond the first that are added", CAM_KERNELS,
        "range(0, slices, BLOCK_S)", "range(0, BLOCK_S, BLOCK_S)",
        ("test_cam.py::test_more_slices_than_are_added_at_a_time",),
    ),
    Mutant(
        "resize without half-pixel centres", CAM_KERNELS,
        "scale * (i.to(ACC) + 0.5) - 0.5, 0.0", "scale * i.to(ACC), 0.0",
        ("test_cam.py::test_resize_and_normalisation_by_hand",),
    ),
    Mutant(
        "resize past the first pixel", CAM_KERNELS,
        "tl.maximum(scale * (i.to(ACC) + 0.5) - 0.5, 0.0)", "scale * (i.to(ACC) + 0.5) - 0.5",
        ("test_cam.py::test_resize_and_normalisation_by_hand",),
    ),
    Mutant(
        "resize by height for both", CAM_KERNELS,
        "_source(x, width, out_width, ACC)", "_source(x, width, out_height, ACC)",
        ("test_cam.py::test_resize_is_that_of_interpolate",),
    ),
    Mutant(
        "extremes: last columns forgotten", CAM_KERNELS,
        "columns = 2 * (width + 1)", "columns = 2 * width - 2",
        ("test_cam.py::test_extremes_are_found_among_few_outputs",),
    ),
    Mutant(
        "extremes: one output too far", CAM_KERNELS,
        "first - 1 + index % 2", "first + index % 2",
        ("test_cam.py::test_extremes_are_found_among_few_outputs",),
    ),
    Mutant(
        "extremes: a zero that is not there", CAM_KERNELS,
        'tl.where(valid, value, float("inf"))', "tl.where(valid, value, 0.0)",
        ("test_cam.py::test_sizes",),
    ),
    Mutant(
        "constant maps are NaN", CAM_KERNELS,
        "value = tl.where(span == 0, 0.0, _divide", 'value = tl.where(span == 0, float("nan"), _divide',
        ("test_cam.py::test_constant_maps_are_zero",),
    ),
    Mutant(
        "NaN lost in the extremes", CAM_KERNELS,
        'tl.where(tl.max(unordered, 0) > 0, float("nan"), high - low)', "high - low",
        ("test_cam.py::test_nan_stays_in_its_image",),
    ),
    Mutant(
        "division that is rounded somehow", CAM_KERNELS,
        "return tl.div_rn(a, b)", "return a / b",
        (
            "test_cam.py::test_extremes_are_found_among_few_outputs",
            "test_cam.py::test_an_axis_of_the_same_size_is_not_resized",
        ),
        emulated=True,  # NumPy rounds quotients correctly
    ),
    Mutant(
        "raw map read back too early", CAM_KERNELS,
        "tl.debug_barrier()  #", "pass  #",
        (
            "test_cam.py::test_work_shared_between_programs",
            "test_cam.py::test_repeatable",
        ),
        emulated=True,  # interpreted programs have one thread
    ),
    Mutant(
        "maps: every block taken as full", CAM,
        "LOAD_G=_launch.plane_load(gradients, tile),\n            EXACT=c % tile.channels == 0",
        "LOAD_G=_launch.plane_load(gradients, tile),\n            EXACT=True",
        ("test_cam.py::test_sizes", "test_cam.py::test_layout_changes_no_value"),
    ),
    Mutant(
        "maps: planes taken as one run whatever their rows", LAUNCH,
        "if channel == h * w and (w == 1 or column == 1) and (h == 1 or row == w):", "if channel == h * w:",
        ("test_cam.py::test_layout_changes_no_value",),
    ),
    Mutant(
        "maps: rows taken as following each other", LAUNCH,
        "elif row == w * column:", "elif row >= w * column:",
        ("test_cam.py::test_layout_changes_no_value",),
    ),
    Mutant(
        "maps: raw where no size is given", CAM,
        "return cam, raw, *results\n\n\ndef _new", "return raw if size is None else cam, raw, *results\n\n\ndef _new",
        ("test_cam.py::test_sizes[33-(3, 17)]",),
    ),
    # Modules
    Mutant(
        "encoders start too wide", MODULES,
        "self.kernel_space_generator.weight, std=0.001", "self.kernel_space_generator.weight, std=0.002",
        ("test_modules.py::test_initialisation",),
    ),
    Mutant(
        "offsets start at random", MODULES,
        "        nn.init.zeros_(self.conv_offset.weight)\n", "",
        ("test_modules.py::test_initialisation",),
    ),
    Mutant(
        "compressor not uniform", MODULES,
        "xavier_uniform_", "xavier_normal_",
        ("test_modules.py::test_initialisation",),
    ),
    Mutant(
        "padding without dilation", MODULES,
        "(self.encoder_kernel - 1) * self.encoder_dilation // 2", "(self.encoder_kernel - 1) // 2",
        ("test_modules.py::test_constructor_arguments_in_the_official_order",),
    ),
    Mutant(
        "offsets from what is not compressed", MODULES,
        "self.scale_factor, self.up_kernel, self.up_group, output_size)\n\n\nclass CARAFEPack",
        "self.scale_factor, self.up_kernel, 1, output_size)\n\n\nclass CARAFEPack",
        ("test_modules.py::test_dlu_is_its_parts[2]",),
    ),
    # Explainers
    Mutant(
        "hooks left behind", CAPTURE,
        "        for handle in handles:", "        for handle in handles[1:]:",
        (
            "test_explain.py::test_hooks_are_removed_after_a_failure",
            "test_explain.py::test_nothing_of_the_users_is_touched",
        ),
    ),
    Mutant(
        "hooks left behind after a failure", CAPTURE,
        "    finally:\n        for handle in handles:",
        "    except ZeroDivisionError:\n        pass\n    else:\n        for handle in handles:",
        ("test_explain.py::test_hooks_are_removed_after_a_failure",),
    ),
    Mutant(
        "activations changed in place", CAPTURE,
        "output.detach().clone().requires_grad_()", "output.detach().requires_grad_()",
        ("test_explain.py::test_in_place_operations_on_what_the_layer_returned_unchanged",),
    ),
    Mutant(
        "ablated activations changed in place", CAPTURE,
        "kept.append(output.clone())", "kept.append(output)",
        ("test_explain.py::test_in_place_operations_on_what_the_layer_returned_unchanged[AblationCAM]",),
    ),
    Mutant(
        "layers in the order they run", CAPTURE,
        "{name: captured[name] for name in layers}", "captured",
        ("test_explain.py::test_several_layers",),
    ),
    Mutant(
        "first run of a repeated layer", CAPTURE,
        "        captured[name] = output.clone()",
        "        if name in captured:\n            return None\n        captured[name] = output.clone()",
        ("test_explain.py::test_tuples_and_repeated_layers",),
    ),
    Mutant(
        "trunk with a graph", CAPTURE,
        "with hooked(layers, capture), torch.no_grad():", "with hooked(layers, capture), torch.enable_grad():",
        ("test_explain.py::test_the_trunk_runs_without_a_graph",),
    ),
    Mutant(
        "worst class explained", CAPTURE,
        "logits.detach().argmax(1)", "logits.detach().argmin(1)",
        ("test_explain.py::test_targets",),
    ),
    Mutant(
        "class of the first image for all ablations", CAPTURE,
        "indices[image : image + 1].expand", "indices[:1].expand",
        ("test_explain.py::test_ablation", "test_metrics.py::test_channel_drops"),
    ),
    Mutant(
        "function of the first image for all ablations", CAPTURE,
        "[self.functions[image]] * len(logits)", "[self.functions[0]] * len(logits)",
        ("test_explain.py::test_targets[AblationCAM]",),
    ),
    Mutant(
        "drops turned round", CAPTURE,
        "return scores.unsqueeze(-1) - after,", "return after - scores.unsqueeze(-1),",
        ("test_metrics.py::test_channel_drops",),
    ),
    Mutant(
        "first tokens instead of the last", CAPTURE,
        "x[..., shape[1] - h * w :, :]", "x[..., : h * w, :]",
        ("test_explain.py::test_tokens",),
    ),
    Mutant(
        "tokens column by column", CAPTURE,
        ".transpose(-1, -2).unflatten(-1, (h, w))", ".transpose(-1, -2).unflatten(-1, (w, h)).transpose(-1, -2)",
        ("test_explain.py::test_tokens",),
    ),
    Mutant(
        "training mode not refused", CAPTURE,
        "isinstance(module, _BatchNorm | _DropoutNd)", "isinstance(module, _DropoutNd)",
        ("test_metrics.py::test_training_mode_is_refused",),
    ),
    Mutant(
        "classes of a batched backward mixed up", CAPTURE,
        "[gradient.transpose(0, 1) for gradient in each]", "[gradient.transpose(0, 1).flip(1) for gradient in each]",
        ("test_explain.py::test_several_classes_are_a_loop",),
    ),
    Mutant(
        "relative drops by the absolute score", EXPLAIN,
        "drops.to(wide) / scores.to(wide)", "drops.to(wide) / scores.to(wide).abs()",
        ("test_explain.py::test_ablation",),
    ),
    Mutant(
        "score of zero", EXPLAIN,
        "scores.to(wide).masked_fill(scores == 0, torch.inf)", "scores.to(wide)",
        ("test_explain.py::test_ablation_of_a_score_of_zero",),
    ),
    Mutant(
        "maps that are zero not dead", EXPLAIN,
        "parts.raw.amax((-2, -1)) <= 0", "parts.raw.amax((-2, -1)) < 0",
        ("test_explain.py::test_dead_maps", "test_explain.py::test_maps_of_zeros_are_dead"),
    ),
    Mutant(
        "fused maps resized before they are normalised", EXPLAIN,
        "reference.finish(reference.finish(raw, relu, None, True), False, size, False)",
        "reference.finish(raw, relu, size, True)",
        ("test_explain.py::test_several_layers",),
    ),
    Mutant(
        "fused maps not normalised again", EXPLAIN,
        "torch.stack(maps).mean(0), False, None, normalize)", "torch.stack(maps).mean(0), False, None, False)",
        ("test_explain.py::test_several_layers",),
    ),
    Mutant(
        "dead if any layer is", EXPLAIN,
        "for explanation in explanations]).all(0)", "for explanation in explanations]).any(0)",
        ("test_explain.py::test_fused_maps_are_dead_where_all_layers_are",),
    ),
    Mutant(
        "overlay the other way round", EXPLAIN,
        "(1 - alpha) * pixels + alpha * colours", "alpha * pixels + (1 - alpha) * colours",
        ("test_explain.py::test_overlay",),
    ),
    # Metrics
    Mutant(
        "conservation relative to the map", METRICS,
        ".abs(), score.abs())", ".abs(), explanation.contributions.sum(-1).abs())",
        ("test_metrics.py::test_sensitivity_and_conservation_by_hand",),
    ),
    Mutant(
        "sensitivity relative to contributions", METRICS,
        "drops.abs().sum(-1))", "contributions.abs().sum(-1))",
        ("test_metrics.py::test_sensitivity_and_conservation_by_hand",),
    ),
    Mutant(
        "bias of batch normalisation without eps", METRICS,
        "(module.running_var + module.eps).rsqrt()", "module.running_var.rsqrt()",
        ("test_metrics.py::test_score_is_activations_plus_biases",),
    ),
    Mutant(
        "bias of batch normalisation without its mean", METRICS,
        "shift = -module.running_mean *", "shift = 0 * module.running_mean *",
        ("test_metrics.py::test_score_is_activations_plus_biases",),
    ),
    Mutant(
        "boxes with their last column", METRICS,
        "(x < edge(x1) + tolerance)", "(x <= edge(x1) + tolerance)",
        ("test_metrics.py::test_pointing_hit", "test_metrics.py::test_energy_in_box"),
    ),
    Mutant(
        "boxes without area widened", METRICS,
        "across & down & real", "across & down",
        ("test_metrics.py::test_pointing_hit",),
    ),
    Mutant(
        "maps of zeros hit", METRICS,
        "(flat.amax(-1) > 0)", "(flat.amax(-1) >= 0)",
        ("test_metrics.py::test_pointing_hit",),
    ),
    Mutant(
        "negative energy", METRICS,
        "torch.float32)).clamp(min=0)", "torch.float32))",
        ("test_metrics.py::test_energy_in_box",),
    ),
    Mutant(
        "drops below zero", METRICS,
        "(before - after).clamp(min=0)", "before - after",
        ("test_metrics.py::test_confidence_change",),
    ),
    Mutant(
        "drops of probabilities of zero", METRICS,
        "_relative((before - after).clamp(min=0), before)", "(before - after).clamp(min=0) / before",
        ("test_metrics.py::test_a_probability_of_zero_has_nothing_to_lose",),
    ),
    Mutant(
        "boxes widened in their own type", METRICS,
        "boxes.to(maps.device, torch.float64)", "boxes.to(maps.device)",
        ("test_metrics.py::test_boxes_of_every_type",),
    ),
    Mutant(
        "energy summed in the type of the map", METRICS,
        "maps.to(torch.promote_types(maps.dtype, torch.float32)).clamp(min=0)", "maps.clamp(min=0)",
        ("test_metrics.py::test_energy_of_large_maps",),
    ),
    Mutant(
        "increase where nothing changes", METRICS,
        "after > before", "after >= before",
        ("test_metrics.py::test_confidence_change",),
    ),
    # OpenMMLab
    Mutant(
        "necks initialise encoders anew", OPENMMLAB,
        "return _Encoder(super()._encoder(out_channels))", "return super()._encoder(out_channels)",
        ("test_openmmlab.py::test_initialisation_outlives_that_of_a_neck",),
    ),
    Mutant(
        "biases of registered encoders not zero", OPENMMLAB,
        "nn.init.zeros_(child.bias)", "nn.init.ones_(child.bias)",
        ("test_openmmlab.py::test_initialisation_outlives_that_of_a_neck",),
    ),
    Mutant(
        "the official layer keeps its name", OPENMMLAB,
        'name="dlu", force=True', 'name="dlu"',
        ("test_openmmlab.py::test_necks_of_others_keep_their_names_and_layers_do_not",),
    ),
    Mutant(
        "necks of others lose their names", OPENMMLAB,
        "    if neck.__name__ not in MODELS.module_dict:\n        MODELS.register_module(module=neck)",
        "    MODELS.register_module(module=neck, force=True)",
        ("test_openmmlab.py::test_necks_of_others_keep_their_names_and_layers_do_not",),
    ),
    Mutant(
        "mmcv's carafe after this one", OPENMMLAB,
        'name="carafe", force=True', 'name="carafe"',
        ("test_openmmlab.py::test_carafe_is_this_one_in_any_order_of_imports",),
    ),
    Mutant(
        "end of the official neck included", OPENMMLAB,
        "end_is_included = False", "end_is_included = True",
        ("test_openmmlab.py::test_levels_of_the_two_necks",),
    ),
    Mutant(
        "bias beside a norm", OPENMMLAB,
        "bias=norm_cfg is None", "bias=True",
        ("test_openmmlab.py::test_levels_of_the_two_necks",),
    ),
    Mutant(
        "other layers not cut", OPENMMLAB,
        "upsampler(maps[level])[..., :height, :width]", "upsampler(maps[level])[..., -height:, -width:]",
        ("test_openmmlab.py::test_other_upsamplers_of_the_official_necks",),
    ),
    Mutant(
        "bilinear aligns corners", OPENMMLAB,
        '"align_corners": False', '"align_corners": True',
        ("test_openmmlab.py::test_other_upsamplers_of_the_official_necks",),
    ),
    Mutant(
        "pyramids share one upsampler", OPENMMLAB,
        "self._upsampler(cfg) for _ in range(num_outs - 1)", "[self._upsampler(cfg)] * (num_outs - 1)",
        ("test_openmmlab.py::test_pyramids_agree_with_eager_float64",),
    ),
    Mutant(
        "more levels beyond an end", CHECKS,
        "None if stop == levels else stop - start)", "None)",
        ("test_openmmlab.py::test_wrong_arguments_of_necks",),
    ),
    # What is not theirs
    Mutant(
        "storage of kernels filled with random numbers", LAUNCH,
        "return torch.empty((n, groups, h, w, padded_taps", "return torch.rand((n, groups, h, w, padded_taps",
        (STATE,),
    ),
    Mutant(
        "storage of maps filled with random numbers", CAM,
        "return torch.empty(shape, dtype=_launch", "return torch.rand(shape, dtype=_launch",
        (STATE,),
    ),
    Mutant(
        "a request for the same bits withdrawn", DLU,
        "return not torch.are_deterministic_algorithms_enabled()",
        "return not torch.are_deterministic_algorithms_enabled() or torch.use_deterministic_algorithms(False)",
        (STATE,),
    ),
    # Argument rules
    Mutant("lower bound left out", CHECKS, "number < low or", "number < low - 1 or", ("test_checks.py::test_bad_input",)),
    Mutant("upper bound left out", CHECKS, "number > high)", "number > high + 1)", ("test_checks.py::test_bad_input",)),
    Mutant(
        "largest kernel refused", CHECKS,
        "MAX_KERNEL_SIZE = 9", "MAX_KERNEL_SIZE = 8",
        ("test_operators.py::test_every_kernel_size_at_many_scales[1-9]",),
    ),
    Mutant(
        "largest scale refused", CHECKS,
        "MAX_SCALE_FACTOR = 16", "MAX_SCALE_FACTOR = 15",
        ("test_operators.py::test_every_scale[16]",),
    ),
    Mutant(
        "even kernels", CHECKS,
        "if number % 2 == 0:", "if number % 2 == 0 and number > 2:",
        ("test_operators.py::test_sizes_beside_those_that_are_allowed",),
    ),
    Mutant(
        "empty columns", CHECKS,
        "if not (c and h and w):", "if not (c and h):",
        ("test_operators.py::test_sizes_beside_those_that_are_allowed",),
    ),
    Mutant(
        "float64 beside float32", CHECKS,
        "(value.dtype == torch.float64) != (other.dtype == torch.float64)",
        "(value.dtype == torch.float64) < (other.dtype == torch.float64)",
        ("test_checks.py::test_bad_input",),
    ),
    Mutant(
        "eps of zero refused", CHECKS,
        "if not 0 <= number <= torch.finfo", "if not 0 < number <= torch.finfo",
        ("test_cam.py::test_by_hand",),
    ),
    Mutant(
        "infinite eps", CHECKS,
        "if not 0 <= number <= torch.finfo(torch.float32).max:", "if not 0 <= number:",
        ("test_cam.py::test_infinite_eps_is_refused",),
    ),
    Mutant(
        "eps infinite in float32", CHECKS,
        "<= torch.finfo(torch.float32).max", "<= torch.finfo(torch.float64).max",
        ("test_checks.py::test_bad_input",),
    ),
    Mutant(
        "as many pixels as there may be refused", CHECKS,
        "if height * width > MAX_MAP_PIXELS:", "if height * width >= MAX_MAP_PIXELS:",
        ("test_cam.py::test_as_many_pixels_as_there_may_be",),
    ),
)
# fmt: on


class Result(NamedTuple):
    verdict: str  # "caught", "hang", "survived" or "broken"
    shown: str  # the test that failed, or what else happened
    seconds: float


# Errors of a copy that does not say what it should, instead of saying it wrong.
BROKEN = re.compile(r"\b(NameError|AttributeError|ImportError|ModuleNotFoundError|SyntaxError|IndentationError)\b")


def copy_tree(directory: Path) -> None:
    """What git knows of or would add, as it is at present."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


def mutated(mutant: Mutant, text: str) -> str:
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: the text is {text.count(mutant.old)} times in {mutant.file}")
    return text.replace(mutant.old, mutant.new)


def in_copy(directory: str, arguments: Sequence[str], output: str) -> None:
    """Run tests of a copy, in a process of its own that has nothing of this tree on its path."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(directory)
    os.environ.update(PYTHONPATH=directory, COLUMNS="1000")
    sys.dont_write_bytecode = False
    sys.path[:] = [directory, *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    import pytest

    assert "triton" not in sys.modules
    code = int(pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]))
    package = sys.modules.get("dlu_triton")
    if package is not None and not package.__file__.startswith(f"{directory}/"):
        print(f"imported {package.__file__} instead of the copy")
        code = WRONG_PACKAGE
    sys.stdout.flush()
    os._exit(code)


def run_tests(directory: Path, tests: Sequence[str], emulated: bool, patience: float | None) -> tuple[int | None, str]:
    """Exit code, None after too long, and what pytest says."""
    output = directory / "output.txt"
    arguments = [*(f"tests/{test}" for test in tests), *(["--emulate", "sm_90"] if emulated else [])]
    process = PROCESSES.Process(target=in_copy, args=(str(directory), arguments, str(output)))
    process.start()
    process.join(patience)
    hangs = process.is_alive()
    if hangs:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    text = output.read_text(errors="replace") if output.exists() else ""
    return None if hangs else process.exitcode, text


def verdict(code: int | None, output: str) -> tuple[str, str]:
    if code is None:
        return "hang", f"nothing after {PATIENCE} s"
    if code == 0:
        return "survived", ""
    found = re.search(r"^(FAILED|ERROR) tests/(.*?)(?: - (.*))?$", output, re.MULTILINE)
    if code != 1 or found is None:
        return "broken", f"exit code {code}: {output.strip().splitlines()[-1] if output.strip() else ''}"[:200]
    kind, test, message = found.groups()
    if kind == "ERROR" or BROKEN.search(message or ""):
        return "broken", f"{test}: {message}"[:200]
    return "caught", test


def try_tests(
    directory: Path, tests: Sequence[str], emulated: bool = False, patience: float | None = PATIENCE
) -> Result:
    start = time.perf_counter()
    code, output = run_tests(directory, tests, emulated, patience)
    return Result(*verdict(code, output), time.perf_counter() - start)


def try_mutant(mutant: Mutant, base: Path) -> Result:
    """In a copy of `base`, and of the bytecode that is there, which saves compiling all but the changed file."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        directory = Path(name).resolve() / "copy"
        shutil.copytree(base, directory)
        file = directory / mutant.file
        file.write_text(mutated(mutant, file.read_text()))
        return try_tests(directory, mutant.tests, mutant.emulated)


def chosen(names: Sequence[str]) -> list[Mutant]:
    """All, or those that begin with one of the names."""
    for name in names:
        if not any(mutant.name.startswith(name) for mutant in MUTANTS):
            raise SystemExit(f"no mutant is called {name!r}")
    return [mutant for mutant in MUTANTS if not names or mutant.name.startswith(tuple(names))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="mutants to try, by the beginning of their names; all if none is given"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    mutants = chosen(options.names)
    width = max(len(mutant.name) for mutant in mutants)
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(options.jobs) as pool:
        base = Path(name).resolve()
        copy_tree(base)
        for emulated in (False, True):
            tests = list(dict.fromkeys(t for mutant in mutants if mutant.emulated == emulated for t in mutant.tests))
            if not tests:
                continue
            result = try_tests(base, tests, emulated, None)  # of all mutants at once
            shown = "as it is, emulated" if emulated else "as it is"
            print(f"{shown:{width}}  {result.verdict:8}  {result.seconds:5.0f} s  {result.shown}", flush=True)
            if result.verdict != "survived":
                return 1
        for mutant, result in zip(mutants, pool.map(lambda mutant: try_mutant(mutant, base), mutants), strict=True):
            results.append((mutant, result))
            print(f"{mutant.name:{width}}  {result.verdict:8}  {result.seconds:5.0f} s  {result.shown}", flush=True)
    missed = [mutant.name for mutant, result in results if result.verdict in ("survived", "broken")]
    print(f"\n{len(results) - len(missed)} of {len(results)} mutants caught")
    if missed:
        print("not caught:", *missed, sep="\n    ")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
