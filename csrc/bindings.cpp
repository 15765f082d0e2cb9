// The Python module maskformer_fast._C. Its functions take addresses, sizes and strides as numbers, so that the module
// needs no headers of torch and works with every version of it.
//
// Each operator has one section. Its functions check the arguments, fill the structs of csrc/NAME/NAME.h and call the
// operator without the GIL. define_NAME adds the functions to the module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "assignment/assignment.h"
#include "attention/attention.h"
#include "common/cpu_isa.h"
#include "convolution/convolution.h"
#include "deformable_attention/deformable_attention.h"
#include "map_cost/map_cost.h"
#include "mask_loss/mask_loss.h"
#include "matching_cost/matching_cost.h"
#include "nearest_masks/nearest_masks.h"
#include "points/points.h"
#include "resized_argmax/resized_argmax.h"
#include "resized_semantic/resized_semantic.h"
#include "rle/rle.h"
#include "segments/segments.h"
#include "semantic/semantic.h"
#include "upscaling/upscaling.h"
#include "window_attention/window_attention.h"

namespace py = pybind11;
using py::arg;

namespace maskformer_fast {
namespace {

template <size_t N>
using Integers = std::array<int64_t, N>;  // sizes or strides
template <size_t N>
using Numbers = std::array<double, N>;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// Converts the address of an array that may be missing or empty.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Converts the address of an array. Throws std::invalid_argument where it is null and the array is `needed`.
template <class T>
T* pointer(const char* name, uintptr_t address, bool needed = true) {
  if (needed && address == 0) throw std::invalid_argument(std::string(name) + ": expected a pointer, got null");
  return pointer<T>(address);
}

template <size_t N>
void check_sizes(const Integers<N>& sizes) {
  for (const int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("sizes: expected >= 0, got " + std::to_string(size));
  }
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected >= 1, got " + std::to_string(threads));
}

// Finds the value of a name. Throws std::invalid_argument for an unknown one.
template <class Enum>
Enum choose(const char* name, const std::string& value,
            const std::initializer_list<std::pair<const char*, Enum>>& known) {
  std::string names;
  for (const auto& [text, result] : known) {
    if (value == text) return result;
    names += std::string(names.empty() ? "" : ", ") + text;
  }
  throw std::invalid_argument(std::string(name) + ": expected one of " + names + ", got " + value);
}

FloatType float_or_bfloat16(const std::string& type) {
  return choose<FloatType>("type", type, {{"float32", FloatType::float32}, {"bfloat16", FloatType::bfloat16}});
}

FocalLoss focal_loss(const Numbers<3>& focal) {
  return {static_cast<float>(focal[0]), static_cast<float>(focal[1]), static_cast<float>(focal[2])};
}

// assignment

template <class T>
AssignmentBatch<T> assignment_batch(uintptr_t cost, const Integers<3>& sizes, const Integers<3>& strides,
                                    uintptr_t counts, uintptr_t row_of) {
  check_sizes(sizes);
  const bool has_result = sizes[0] > 0 && sizes[2] > 0;
  return {pointer<const T>("cost", cost, has_result && sizes[1] > 0), sizes, strides, pointer<const int64_t>(counts),
          pointer<int64_t>("row_of", row_of, has_result)};
}

template <class T>
void define_assignment(py::module_& module, const std::string& type) {
  module.def(
      ("linear_sum_assignment_" + type).c_str(),
      [](uintptr_t cost, const Integers<3>& sizes, const Integers<3>& strides, uintptr_t counts, uintptr_t row_of,
         int threads) {
        check_threads(threads);
        linear_sum_assignment(assignment_batch<T>(cost, sizes, strides, counts, row_of), threads);
      },
      arg("cost"), arg("sizes"), arg("strides"), arg("counts"), arg("row_of"), arg("threads"), ReleaseGil(),
      "Addresses of cost [batch, rows, columns] (strides in elements), int64 counts [batch] or 0, and the int64 result "
      "[batch, columns].");
#ifdef MF_HAS_CUDA
  module.def(
      ("assignment_scratch_bytes_" + type).c_str(),
      [](uintptr_t cost, const Integers<3>& sizes, const Integers<3>& strides, uintptr_t counts, uintptr_t row_of,
         int device) {
        return assignment_scratch_bytes(assignment_batch<T>(cost, sizes, strides, counts, row_of), device);
      },
      arg("cost"), arg("sizes"), arg("strides"), arg("counts"), arg("row_of"), arg("device"), ReleaseGil(),
      "Bytes of scratch memory that linear_sum_assignment_cuda needs for the same arguments.");
  module.def(
      ("linear_sum_assignment_cuda_" + type).c_str(),
      [](uintptr_t cost, const Integers<3>& sizes, const Integers<3>& strides, uintptr_t counts, uintptr_t row_of,
         uintptr_t scratch, int64_t scratch_bytes, int device, uintptr_t stream) {
        linear_sum_assignment_cuda(assignment_batch<T>(cost, sizes, strides, counts, row_of), pointer<void>(scratch),
                                   scratch_bytes, device, pointer<void>(stream));
      },
      arg("cost"), arg("sizes"), arg("strides"), arg("counts"), arg("row_of"), arg("scratch"), arg("scratch_bytes"),
      arg("device"), arg("stream"), ReleaseGil(),
      "Arguments of linear_sum_assignment with addresses on the device. Starts on the stream and does not wait.");
#endif
}

// attention

using AttentionAddresses = std::array<uintptr_t, 4>;  // query, key, value, visible

Attention attention_sizes(const AttentionAddresses& addresses, const Integers<5>& sizes, const Integers<9>& strides,
                          const Integers<2>& masked) {
  check_sizes(sizes);
  check_sizes(masked);
  const auto [images, queries, keys, heads, dim] = sizes;
  if (keys < 1 || dim < 1) throw std::invalid_argument("sizes: expected keys and channels, got none");
  if (masked[0] > queries || masked[1] > keys) {
    throw std::invalid_argument("masked: expected at most the queries and keys");
  }
  const auto of = [&](int part) { return TokenStrides{strides[part], strides[part + 1], strides[part + 2]}; };
  const bool any = images > 0 && masked[0] > 0 && masked[1] > 0;
  return {images, queries, keys,  heads,
          dim,    of(0),   of(3), of(6),
          pointer<const uint8_t>("visible", addresses[3], any), masked[0], masked[1]};
}

void define_attention(py::module_& module) {
  module.def(
      "attention",
      [](const AttentionAddresses& addresses, const std::string& type, const Integers<5>& sizes,
         const Integers<9>& strides, const Integers<2>& masked, uintptr_t result, uintptr_t statistics, int threads) {
        check_threads(threads);
        const Attention sized = attention_sizes(addresses, sizes, strides, masked);
        const auto run = [&](auto element) {
          using Element = decltype(element);
          attention(sized, pointer<const Element>(addresses[0]), pointer<const Element>(addresses[1]),
                    pointer<const Element>(addresses[2]), pointer<Element>(result), pointer<float>(statistics),
                    threads);
        };
        float_or_bfloat16(type) == FloatType::float32 ? run(float{}) : run(uint16_t{});
      },
      arg("addresses"), arg("type"), arg("sizes"), arg("strides"), arg("masked"), arg("result"), arg("statistics"),
      arg("threads"), ReleaseGil(),
      "Addresses of query, key, value, float32 or bfloat16, and of the mask (0: none), sizes: images, queries, keys, "
      "heads, channels of a head; strides of the three by image, token and head in elements; masked: queries and keys; "
      "addresses of the result and the float32 statistics with the shapes in csrc/attention/attention.h.");
  module.def(
      "attention_backward",
      [](const AttentionAddresses& addresses, const Integers<5>& sizes, const Integers<9>& strides,
         const Integers<2>& masked, uintptr_t result, uintptr_t statistics, uintptr_t upstream,
         const std::array<uintptr_t, 3>& gradients, int threads) {
        check_threads(threads);
        attention_backward(
            attention_sizes(addresses, sizes, strides, masked), pointer<const float>(addresses[0]),
            pointer<const float>(addresses[1]), pointer<const float>(addresses[2]), pointer<const float>(result),
            pointer<const float>(statistics), pointer<const float>(upstream),
            {pointer<float>(gradients[0]), pointer<float>(gradients[1]), pointer<float>(gradients[2])}, threads);
      },
      arg("addresses"), arg("sizes"), arg("strides"), arg("masked"), arg("result"), arg("statistics"),
      arg("upstream"), arg("gradients"), arg("threads"), ReleaseGil(),
      "Arguments of attention in float32, the gradient by the result, and addresses of those by query, key and value.");
}

// convolution

void define_convolution(py::module_& module) {
  module.def(
      "conv3x3_winograd",
      [](uintptr_t images, const std::string& type, const Integers<5>& sizes, uintptr_t weights, uintptr_t bias,
         bool relu, uintptr_t result, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [count, height, width, in_channels, out_channels] = sizes;
        const WinogradConvolution conv{height,
                                       width,
                                       in_channels,
                                       out_channels,
                                       pointer<const float>("weights", weights),
                                       pointer<const float>(bias),
                                       relu};
        if (float_or_bfloat16(type) == FloatType::float32) {
          conv3x3_winograd(conv, pointer<const float>(images), count, pointer<float>(result), threads);
        } else {
          conv3x3_winograd(conv, pointer<const uint16_t>(images), count, pointer<uint16_t>(result), threads);
        }
      },
      arg("images"), arg("type"), arg("sizes"), arg("weights"), arg("bias"), arg("relu"), arg("result"), arg("threads"),
      ReleaseGil(),
      "Addresses of images and result, channels innermost, float32 or bfloat16, and of float32 weights and bias (0: "
      "none) with the shapes in csrc/convolution/convolution.h. sizes: images, height, width, channels in and out.");
  module.def(
      "winograd_tiles",
      [](uintptr_t maps, bool of_gradient, const Integers<6>& sizes, uintptr_t result, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [height, width, channels, first, last, step] = sizes;
        const WinogradTiles tiles{height, width, channels, first, last, step};
        const auto transform = of_gradient ? winograd_gradient_tiles : winograd_image_tiles;
        transform(tiles, pointer<const float>("maps", maps), pointer<float>("result", result), threads);
      },
      arg("maps"), arg("of_gradient"), arg("sizes"), arg("result"), arg("threads"), ReleaseGil(),
      "Addresses of float32 maps, channels innermost, and of the result, with the shapes in "
      "csrc/convolution/convolution.h. sizes: height, width, channels, first and last tile, step from tap to tap.");
}

// deformable_attention

DeformableAttention deformable_sizes(const Integers<7>& sizes, const std::vector<int64_t>& level_sizes,
                                     uintptr_t reference_points) {
  check_sizes(sizes);
  const auto [count, cells, heads, dim, queries, levels, points] = sizes;
  if (levels < 1 || points < 1 || static_cast<int64_t>(level_sizes.size()) != 2 * levels) {
    throw std::invalid_argument("level_sizes: expected height and width of each level, and at least one point");
  }
  int64_t area = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = level_sizes[2 * level], width = level_sizes[2 * level + 1];
    if (height < 1 || width < 1 || height >= 1 << 24 || width >= 1 << 24) {  // float counts cells exactly
      throw std::invalid_argument("level_sizes: expected sides in 1..2^24-1");
    }
    area += height * width;
  }
  if (area != cells || cells > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("level_sizes: expected " + std::to_string(cells) + " cells, below 2^31, got " +
                                std::to_string(area));
  }
  return {count,  cells,  heads,  dim,
          queries, levels, points, level_sizes.data(),
          pointer<const float>("reference_points", reference_points, count > 0 && queries > 0)};
}

void define_deformable_attention(py::module_& module) {
  module.def(
      "deformable_attention",
      [](uintptr_t value, const std::string& type, const Integers<7>& sizes, const std::vector<int64_t>& level_sizes,
         uintptr_t reference_points, uintptr_t offsets, uintptr_t logits, uintptr_t result, int threads) {
        check_threads(threads);
        const DeformableAttention attention = deformable_sizes(sizes, level_sizes, reference_points);
        const auto run = [&](auto element) {
          using Element = decltype(element);
          deformable_attention(attention, pointer<const Element>(value), pointer<const Element>(offsets),
                               pointer<const Element>(logits), pointer<Element>(result), threads);
        };
        float_or_bfloat16(type) == FloatType::float32 ? run(float{}) : run(uint16_t{});
      },
      arg("value"), arg("type"), arg("sizes"), arg("level_sizes"), arg("reference_points"), arg("offsets"),
      arg("logits"), arg("result"), arg("threads"), ReleaseGil(),
      "Addresses of value, offsets, logits and result, float32 or bfloat16, and of the float32 reference points with "
      "the shapes in csrc/deformable_attention/deformable_attention.h. sizes: images, cells, heads, channels of a head, "
      "queries, levels, points; level_sizes: height and width of each level.");
  module.def(
      "deformable_attention_backward",
      [](uintptr_t upstream, uintptr_t value, const std::string& type, const Integers<7>& sizes,
         const std::vector<int64_t>& level_sizes, uintptr_t reference_points, uintptr_t offsets, uintptr_t logits,
         uintptr_t by_value, uintptr_t by_offset, uintptr_t by_logit, int threads) {
        check_threads(threads);
        const DeformableAttention attention = deformable_sizes(sizes, level_sizes, reference_points);
        const auto run = [&](auto element) {
          using Element = decltype(element);
          deformable_attention_backward(
              attention, pointer<const Element>(upstream), pointer<const Element>(value),
              pointer<const Element>(offsets), pointer<const Element>(logits),
              DeformableGradients<Element>{pointer<Element>(by_value), pointer<Element>(by_offset),
                                           pointer<Element>(by_logit)},
              threads);
        };
        float_or_bfloat16(type) == FloatType::float32 ? run(float{}) : run(uint16_t{});
      },
      arg("upstream"), arg("value"), arg("type"), arg("sizes"), arg("level_sizes"), arg("reference_points"),
      arg("offsets"), arg("logits"), arg("by_value"), arg("by_offset"), arg("by_logit"), arg("threads"), ReleaseGil(),
      "Address of the gradient by the result, arguments of deformable_attention, and addresses of the gradients by "
      "value, offsets and logits.");
}

// mask_loss

using MaskAddresses = std::array<uintptr_t, 4>;  // logits, masks, rows, valid_sizes

MaskPairs mask_pairs(const MaskAddresses& addresses, const Integers<6>& sizes, const Numbers<3>& focal) {
  check_sizes(sizes);
  const auto [pairs, height, width, targets, input_height, input_width] = sizes;
  const auto [logits, masks, rows, valid_sizes] = addresses;
  if (pairs > 0 && (height == 0 || width == 0 || input_height == 0 || input_width == 0)) {
    throw std::invalid_argument("sizes: expected pixels, got none");
  }
  return {pairs,
          height,
          width,
          targets,
          input_height,
          input_width,
          pointer<const float>("logits", logits, pairs > 0),
          pointer<const uint8_t>(masks),
          pointer<const int64_t>("rows", rows, pairs > 0),
          pointer<const int64_t>(valid_sizes),
          focal_loss(focal)};
}

void define_mask_loss(py::module_& module) {
  module.def(
      "mask_sums",
      [](const MaskAddresses& addresses, const Integers<6>& sizes, const Numbers<3>& focal, uintptr_t sums,
         int threads) {
        check_threads(threads);
        mask_sums(mask_pairs(addresses, sizes, focal), pointer<float>(sums), threads);
      },
      arg("addresses"), arg("sizes"), arg("focal"), arg("sums"), arg("threads"), ReleaseGil(),
      "Addresses of logits, masks, rows and valid_sizes (0: all pixels count), contiguous with the shapes in "
      "csrc/mask_loss/mask_loss.h, and of the float32 sums. sizes: pairs, height, width, targets, input height and "
      "width; focal: weight on, weight off, exponent.");
  module.def(
      "mask_sums_backward",
      [](uintptr_t upstream, const MaskAddresses& addresses, const Integers<6>& sizes, const Numbers<3>& focal,
         uintptr_t gradient, int threads) {
        check_threads(threads);
        mask_sums_backward(mask_pairs(addresses, sizes, focal), pointer<const float>(upstream),
                           pointer<float>(gradient), threads);
      },
      arg("upstream"), arg("addresses"), arg("sizes"), arg("focal"), arg("gradient"), arg("threads"), ReleaseGil(),
      "Address of the gradient by the sums, arguments of mask_sums, and address of the gradient by the logits.");
}

// matching_cost

void define_matching_cost(py::module_& module) {
  module.def(
      "matching_cost",
      [](uintptr_t class_logits, uintptr_t embeddings, uintptr_t pixels, const Integers<4>& pixel_strides,
         uintptr_t labels, uintptr_t counts, uintptr_t masks, uintptr_t valid_sizes, const Integers<10>& sizes,
         const Numbers<3>& weights, const Numbers<3>& focal, uintptr_t cost, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [layers, images, queries, classes, depth, height, width, slots, input_height, input_width] = sizes;
        if (layers == 0 || images == 0 || queries == 0 || slots == 0) return;
        if (height == 0 || width == 0 || input_height == 0 || input_width == 0 || classes == 0) {
          throw std::invalid_argument("sizes: expected pixels and classes, got none");
        }
        MatchingBatch batch{};
        batch.layers = layers;
        batch.images = images;
        batch.queries = queries;
        batch.classes = classes;
        batch.height = height;
        batch.width = width;
        batch.slots = slots;
        batch.input_height = input_height;
        batch.input_width = input_width;
        batch.class_logits = pointer<const float>("class_logits", class_logits);
        batch.embeddings = pointer<const float>("embeddings", embeddings);
        batch.pixels = pointer<const float>(pixels);
        batch.depth = depth;
        batch.pixel_strides = pixel_strides;
        batch.labels = pointer<const int64_t>("labels", labels);
        batch.counts = pointer<const int64_t>("counts", counts);
        batch.masks = pointer<const uint8_t>("masks", masks);
        batch.valid_sizes = pointer<const int64_t>(valid_sizes);
        batch.class_weight = weights[0];
        batch.mask_weight = weights[1];
        batch.dice_weight = weights[2];
        batch.loss = focal_loss(focal);
        batch.cost = pointer<float>("cost", cost);
        matching_cost(batch, threads);
      },
      arg("class_logits"), arg("embeddings"), arg("pixels"), arg("pixel_strides"), arg("labels"), arg("counts"),
      arg("masks"), arg("valid_sizes"), arg("sizes"), arg("weights"), arg("focal"), arg("cost"), arg("threads"),
      ReleaseGil(),
      "Addresses of arrays with the shapes in csrc/matching_cost/matching_cost.h (pixels 0: embeddings are mask "
      "logits; valid_sizes 0: all pixels count). sizes: layers, images, queries, classes, depth, height, width, slots, "
      "input height and width; weights: class, mask, dice; focal: weight on, weight off, exponent.");
}

// nearest_masks

void define_nearest_masks(py::module_& module) {
  module.def(
      "nearest_masks",
      [](const std::array<uintptr_t, 3>& addresses, const Integers<5>& sizes, uintptr_t result, uintptr_t boxes,
         int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [count, height, width, out_height, out_width] = sizes;
        if (out_height == 0 || out_width == 0) throw std::invalid_argument("sizes: expected a result that has pixels");
        const auto [masks, rows, columns] = addresses;
        nearest_masks({pointer<const uint8_t>(masks), count, height, width, pointer<const int64_t>("rows", rows),
                       pointer<const int64_t>("columns", columns), out_height, out_width},
                      pointer<uint8_t>(result), pointer<float>(boxes), threads);
      },
      arg("addresses"), arg("sizes"), arg("result"), arg("boxes"), arg("threads"), ReleaseGil(),
      "Addresses of packed masks, rows and columns, and of the results, with the shapes in "
      "csrc/nearest_masks/nearest_masks.h. sizes: masks, height, width, height and width of the result.");
}

// points

// Throws std::invalid_argument for maps whose places do not fit 32 bits.
void check_map(int64_t height, int64_t width) {
  constexpr int64_t kMost = 1 << 15;
  if (height < 1 || width < 1 || height > kMost || width > kMost) {
    throw std::invalid_argument("sizes: expected maps of 1..32768 rows and columns, got " + std::to_string(height) +
                                " x " + std::to_string(width));
  }
}

// Calls run(null pointer of the element type).
template <class Run>
void for_element(const std::string& type, const Run& run) {
  float_or_bfloat16(type) == FloatType::float32 ? run(static_cast<float*>(nullptr))
                                                : run(static_cast<uint16_t*>(nullptr));
}

PointPairs point_pairs(const std::array<uintptr_t, 3>& addresses, const Integers<4>& sizes, const Numbers<3>& focal) {
  check_sizes(sizes);
  const auto [count, height, width, points] = sizes;
  check_map(height, width);
  return {count, height, width, points, pointer<const int64_t>(addresses[0]), pointer<const float>(addresses[1]),
          pointer<const float>(addresses[2]), focal_loss(focal)};
}

void define_points(py::module_& module) {
  module.def(
      "sample_masks",
      [](const std::string& format, const std::array<uintptr_t, 4>& addresses, const Integers<8>& sizes,
         uintptr_t result, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [count, height, width, extent_height, extent_width, rows, groups, points] = sizes;
        if (count > 0) check_map(height, width);
        const auto kind = choose<MaskFormat>(
            "format", format,
            {{"float32", MaskFormat::float32}, {"bool", MaskFormat::bytes}, {"uint8", MaskFormat::packed}});
        sample_masks({kind, pointer<const void>(addresses[0]), count, height, width, extent_height, extent_width, rows,
                      pointer<const int64_t>(addresses[1]), pointer<const int64_t>(addresses[2]),
                      pointer<const float>(addresses[3]), groups, points},
                     pointer<float>(result), threads);
      },
      arg("format"), arg("addresses"), arg("sizes"), arg("result"), arg("threads"), ReleaseGil(),
      "format: element type of the masks, uint8 for packed ones. Addresses of masks, masks of rows, groups of rows and "
      "points, with the shapes in csrc/points/points.h. sizes: masks, height, width, extent's height and width, rows, "
      "groups, points.");
  module.def(
      "choose_points",
      [](const std::string& type, const std::array<uintptr_t, 4>& addresses, const Integers<7>& sizes,
         uintptr_t result, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [count, height, width, groups, candidates, random, uncertain] = sizes;
        check_map(height, width);
        if (uncertain > candidates) throw std::invalid_argument("uncertain: expected at most the candidates");
        const PointChoice choice{count,
                                 height,
                                 width,
                                 pointer<const int64_t>(addresses[1]),
                                 pointer<const float>(addresses[2]),
                                 pointer<const float>(addresses[3]),
                                 groups,
                                 candidates,
                                 random,
                                 uncertain};
        for_element(type, [&](auto* none) {
          using Element = std::remove_pointer_t<decltype(none)>;
          choose_points(choice, pointer<const Element>(addresses[0]), pointer<float>(result), threads);
        });
      },
      arg("type"), arg("addresses"), arg("sizes"), arg("result"), arg("threads"), ReleaseGil(),
      "Addresses of logits (float32 or bfloat16), groups, candidates and random points, with the shapes in "
      "csrc/points/points.h. sizes: maps, height, width, groups, candidates, random points, uncertain points.");
  module.def(
      "point_sums",
      [](const std::string& type, uintptr_t logits, const std::array<uintptr_t, 3>& addresses, const Integers<4>& sizes,
         const Numbers<3>& focal, uintptr_t sums, int threads) {
        check_threads(threads);
        const PointPairs pairs = point_pairs(addresses, sizes, focal);
        for_element(type, [&](auto* none) {
          using Element = std::remove_pointer_t<decltype(none)>;
          point_sums(pairs, pointer<const Element>(logits), pointer<float>(sums), threads);
        });
      },
      arg("type"), arg("logits"), arg("addresses"), arg("sizes"), arg("focal"), arg("sums"), arg("threads"),
      ReleaseGil(),
      "Address of logits (float32 or bfloat16); addresses of rows, points and truth, with the shapes in "
      "csrc/points/points.h. sizes: pairs, height, width, points; focal: weight on, weight off, exponent.");
  module.def(
      "point_sums_backward",
      [](const std::string& type, uintptr_t upstream, uintptr_t logits, const std::array<uintptr_t, 3>& addresses,
         const Integers<4>& sizes, const Numbers<3>& focal, uintptr_t gradient, int threads) {
        check_threads(threads);
        const PointPairs pairs = point_pairs(addresses, sizes, focal);
        for_element(type, [&](auto* none) {
          using Element = std::remove_pointer_t<decltype(none)>;
          point_sums_backward(pairs, pointer<const float>(upstream), pointer<const Element>(logits),
                              pointer<Element>(gradient), threads);
        });
      },
      arg("type"), arg("upstream"), arg("logits"), arg("addresses"), arg("sizes"), arg("focal"), arg("gradient"),
      arg("threads"), ReleaseGil(),
      "Address of the gradient by the sums, arguments of point_sums, and address of the gradient by the logits.");
  module.def(
      "point_cost",
      [](const std::string& type, const std::array<uintptr_t, 6>& addresses, const Integers<9>& sizes,
         const Numbers<3>& weights, const Numbers<3>& focal, uintptr_t cost, int threads) {
        check_sizes(sizes);
        check_threads(threads);
        const auto [layers, images, queries, classes, height, width, slots, points, point_layers] = sizes;
        if (layers == 0 || images == 0 || queries == 0 || slots == 0) return;
        const auto [class_logits, logits, at, truth, labels, counts] = addresses;
        if (at) check_map(height, width);
        if (classes == 0) throw std::invalid_argument("sizes: expected classes, got none");
        const PointCosts costs{layers,
                               images,
                               queries,
                               classes,
                               height,
                               width,
                               slots,
                               points,
                               point_layers,
                               pointer<const float>("class_logits", class_logits),
                               pointer<const float>(at),
                               pointer<const float>(truth),
                               pointer<const int64_t>("labels", labels),
                               pointer<const int64_t>("counts", counts),
                               weights[0],
                               weights[1],
                               weights[2],
                               focal_loss(focal)};
        for_element(type, [&, maps = logits](auto* none) {
          using Element = std::remove_pointer_t<decltype(none)>;
          const auto cost_of = costs.points ? map_cost<Element> : point_cost<Element>;
          cost_of(costs, pointer<const Element>(maps), pointer<float>(cost), threads);
        });
      },
      arg("type"), arg("addresses"), arg("sizes"), arg("weights"), arg("focal"), arg("cost"), arg("threads"),
      ReleaseGil(),
      "Addresses of class logits, mask logits (float32 or bfloat16), points (0: mask logits are at the points), truth, "
      "labels and counts, with the shapes in csrc/points/points.h. sizes: layers, images, queries, classes, height, "
      "width, slots, points, layers of points; weights: class, mask, dice; focal: weight on, weight off, exponent.");
}

// resized_argmax

ScoreGrid score_grid(uintptr_t scores, uintptr_t score_of_point, const Integers<4>& band, const Integers<2>& channels) {
  const auto [first_row, rows, grid_rows, columns] = band;
  return {pointer<const float>("scores", scores),
          pointer<const int32_t>(score_of_point),
          first_row,
          rows,
          grid_rows,
          columns,
          channels[0],
          channels[1]};
}

void define_resized_argmax(py::module_& module) {
  module.def(
      "resized_argmax",
      [](uintptr_t scores, uintptr_t score_of_point, const Integers<4>& band, const Integers<2>& channels,
         uintptr_t decided, const std::string& kind, uintptr_t scale, uintptr_t own_value, uintptr_t labels,
         const Integers<2>& size, uintptr_t won, uintptr_t owned, uintptr_t both, int threads) {
        check_threads(threads);
        const ArgmaxKind chosen = choose<ArgmaxKind>(
            "kind", kind,
            {{"scores", ArgmaxKind::scores}, {"masks", ArgmaxKind::masks}, {"sigmoids", ArgmaxKind::sigmoids}});
        const bool counted = chosen != ArgmaxKind::scores;
        resized_argmax(score_grid(scores, score_of_point, band, channels), pointer<const int32_t>(decided), chosen,
                       pointer<const float>("scale", scale, chosen == ArgmaxKind::sigmoids),
                       pointer<const float>("own_value", own_value, counted),
                       {pointer<void>("labels", labels), size, pointer<int64_t>("won", won, counted),
                        pointer<int64_t>("owned", owned, counted), pointer<int64_t>("both", both, counted)},
                       threads);
      },
      arg("scores"), arg("score_of_point"), arg("band"), arg("channels"), arg("decided"), arg("kind"), arg("scale"),
      arg("own_value"), arg("labels"), arg("size"), arg("won"), arg("owned"), arg("both"), arg("threads"), ReleaseGil(),
      "Addresses of float32 scores [points, pitch], of int32 score_of_point and decided (0: none), of float32 scale and "
      "own_value [pitch], of labels and of int64 counts, as in csrc/resized_argmax/resized_argmax.h. band: first row, "
      "rows, rows of the grid, columns. channels: their number, and the pitch.");
  module.def(
      "twice_resized_winners",
      [](uintptr_t values, const Integers<4>& sizes, const Integers<2>& grid, const Integers<2>& window,
         const std::string& kind, uintptr_t scale, uintptr_t own_value, uintptr_t labels, const Integers<2>& size,
         const std::array<uintptr_t, 3>& counts, int threads) {
        check_threads(threads);
        const ArgmaxKind chosen =
            choose<ArgmaxKind>("kind", kind, {{"masks", ArgmaxKind::masks}, {"sigmoids", ArgmaxKind::sigmoids}});
        const auto [rows, columns, channels, pitch] = sizes;
        const auto [won, owned, both] = counts;
        twice_resized_winners({pointer<const float>("values", values), rows, columns, channels, pitch, grid, window},
                              chosen, pointer<const float>("scale", scale),
                              pointer<const float>("own_value", own_value),
                              {pointer<void>("labels", labels), size, pointer<int64_t>("won", won),
                               pointer<int64_t>("owned", owned), pointer<int64_t>("both", both)},
                              threads);
      },
      arg("values"), arg("sizes"), arg("grid"), arg("window"), arg("kind"), arg("scale"), arg("own_value"),
      arg("labels"), arg("size"), arg("counts"), arg("threads"), ReleaseGil(),
      "Addresses of float32 logits [rows, columns, pitch], of scale and own_value [pitch], of labels and of the int64 "
      "counts won, owned and both. sizes: rows, columns, channels, pitch.");
  module.def(
      "decide_cells",
      [](uintptr_t scores, const Integers<4>& band, const Integers<2>& channels, uintptr_t slack, float others,
         uintptr_t labels, uintptr_t decided, int threads) {
        check_threads(threads);
        decide_cells({score_grid(scores, 0, band, channels), pointer<const float>("slack", slack), others,
                      pointer<const int32_t>("labels", labels), pointer<int32_t>("decided", decided)},
                     threads);
      },
      arg("scores"), arg("band"), arg("channels"), arg("slack"), arg("others"), arg("labels"), arg("decided"),
      arg("threads"), ReleaseGil(),
      "Addresses of float32 scores [points, pitch] and slack [pitch], of int32 labels [channels] and of the int32 result "
      "[rows, columns]; band and channels as for resized_argmax.");
}

// resized_semantic

void define_resized_semantic(py::module_& module) {
  module.def(
      "grid_semantic",
      [](uintptr_t logits, const Integers<3>& sizes, uintptr_t order, uintptr_t weights, const Integers<2>& classes,
         int64_t kept, uintptr_t live_weights, uintptr_t slack, uintptr_t live_classes, const Integers<2>& live,
         float others, const Integers<2>& grid, const Integers<2>& window, uintptr_t labels, const Integers<2>& size,
         int threads) {
        check_threads(threads);
        const auto [queries, rows, columns] = sizes;
        const bool bounded = kept > 0;
        grid_semantic({pointer<const float>("logits", logits), pointer<const int32_t>("order", order),
                       pointer<const float>("weights", weights), queries, rows, columns, classes[0], classes[1], kept,
                       pointer<const float>("live_weights", live_weights, bounded),
                       pointer<const float>("slack", slack, bounded),
                       pointer<const int32_t>("live_classes", live_classes, bounded), live[0], live[1], others, grid,
                       window},
                      pointer<int64_t>("labels", labels), size, threads);
      },
      arg("logits"), arg("sizes"), arg("order"), arg("weights"), arg("classes"), arg("kept"), arg("live_weights"),
      arg("slack"), arg("live_classes"), arg("live"), arg("others"), arg("grid"), arg("window"), arg("labels"),
      arg("size"), arg("threads"), ReleaseGil(),
      "Addresses of contiguous float32 logits [queries, rows, columns], of the int32 order of queries, of float32 "
      "weights, of float32 live_weights and slack and int32 live_classes (0: none kept), and of int64 labels, as in "
      "csrc/resized_semantic/resized_semantic.h. classes, live: their number, and the pitch.");
}

// rle

void define_rle(py::module_& module) {
  module.def(
      "encode_packed_masks",
      [](uintptr_t masks, const Integers<3>& sizes, int threads, uintptr_t areas) {
        check_threads(threads);
        const auto [count, height, width] = sizes;
        if (count < 0 || height < 1 || width < 1) throw std::invalid_argument("sizes: expected masks that have pixels");
        std::vector<std::string> encoded;
        {
          py::gil_scoped_release release;
          encoded = encode_packed_masks(pointer<const uint8_t>(masks), count, height, width, threads,
                                        pointer<int64_t>(areas));
        }
        py::list result;
        for (const std::string& counts : encoded) result.append(py::bytes(counts));
        return result;
      },
      arg("masks"), arg("sizes"), arg("threads"), arg("areas") = uintptr_t{0},
      "Address of contiguous packed masks, and their count, height and width in pixels -> compressed COCO counts. Writes "
      "the masks' areas to an int64 array of this address, if it is not 0.");
  module.def(
      "encode_map",
      [](const std::string& type, uintptr_t map, const Integers<2>& size, const std::vector<int64_t>& values,
         uintptr_t areas, uintptr_t boxes) {
        const MapType chosen = choose<MapType>("type", type,
                                               {{"uint8", MapType::uint8},
                                                {"int16", MapType::int16},
                                                {"int32", MapType::int32},
                                                {"int64", MapType::int64},
                                                {"float32", MapType::float32}});
        if (size[0] < 1 || size[1] < 1) throw std::invalid_argument("size: expected a map that has pixels");
        std::vector<std::string> encoded;
        {
          py::gil_scoped_release release;
          encoded = encode_map(chosen, pointer<const void>("map", map), size[0], size[1], values,
                               pointer<int64_t>(areas), pointer<int64_t>(boxes));
        }
        py::list result;
        for (const std::string& counts : encoded) result.append(py::bytes(counts));
        return result;
      },
      arg("type"), arg("map"), arg("size"), arg("values"), arg("areas"), arg("boxes"),
      "Address of a contiguous map [height, width], values that differ, and addresses of the int64 results: areas "
      "[values] and boxes [values, 4] -> compressed COCO counts of the pixels that have each value.");
}

// segments

MaskWindow mask_window(uintptr_t logits, const Integers<4>& sizes, const Integers<3>& strides, const Numbers<2>& extent,
                       const Integers<2>& output) {
  check_sizes(sizes);
  for (const int64_t side : output) {
    if (side < 1) throw std::invalid_argument("output: expected positive sides, got " + std::to_string(side));
  }
  for (const double side : extent) {
    if (!(side > 0)) throw std::invalid_argument("extent: expected positive sides, got " + std::to_string(side));
  }
  return {pointer<const float>(logits), sizes, strides, extent, output};
}

void define_segments(py::module_& module) {
  module.def(
      "panoptic_inference",
      [](uintptr_t logits, const Integers<4>& sizes, const Integers<3>& strides, const Numbers<2>& extent,
         const Integers<2>& output, uintptr_t scores, uintptr_t categories, uintptr_t is_thing, int64_t classes,
         double overlap_threshold, const std::string& rule, uintptr_t id_map, uintptr_t ids, uintptr_t areas,
         int threads) {
        check_threads(threads);
        panoptic_inference(mask_window(logits, sizes, strides, extent, output),
                           {pointer<const float>(scores), pointer<const int64_t>(categories),
                            pointer<const bool>(is_thing), classes, overlap_threshold, rule},
                           {pointer<int32_t>(id_map), pointer<int32_t>(ids), pointer<int64_t>(areas)}, threads);
      },
      arg("logits"), arg("sizes"), arg("strides"), arg("extent"), arg("output"), arg("scores"), arg("categories"),
      arg("is_thing"), arg("classes"), arg("overlap_threshold"), arg("rule"), arg("id_map"), arg("ids"), arg("areas"),
      arg("threads"), ReleaseGil(),
      "Addresses of float32 logits [batch, queries, rows, columns] (strides in floats, columns adjacent), of "
      "contiguous scores, categories, is_thing, and of the results, with the shapes in csrc/segments/segments.h.");
  module.def(
      "instance_inference",
      [](uintptr_t logits, const Integers<4>& sizes, const Integers<3>& strides, const Numbers<2>& extent,
         const Integers<2>& output, uintptr_t masks, uintptr_t areas, uintptr_t boxes, uintptr_t scores, int threads) {
        check_threads(threads);
        instance_inference(mask_window(logits, sizes, strides, extent, output),
                           {pointer<uint8_t>(masks), pointer<int64_t>(areas), pointer<float>(boxes),
                            pointer<float>(scores)},
                           threads);
      },
      arg("logits"), arg("sizes"), arg("strides"), arg("extent"), arg("output"), arg("masks"), arg("areas"),
      arg("boxes"), arg("scores"), arg("threads"), ReleaseGil(),
      "Addresses of float32 logits [batch, queries, rows, columns] (strides in floats, columns adjacent) and of the "
      "results, with the shapes in csrc/segments/segments.h.");
}

// semantic

FloatType float_type(const char* name, const std::string& value) {
  return choose<FloatType>(
      name, value,
      {{"float32", FloatType::float32}, {"bfloat16", FloatType::bfloat16}, {"float16", FloatType::float16}});
}

void define_semantic(py::module_& module) {
  module.def(
      "semantic_inference",
      [](uintptr_t masks, const std::string& mask_type, const Integers<4>& mask_sizes, const Integers<4>& mask_strides,
         uintptr_t logits, const std::string& logit_type, int64_t classes, const Integers<3>& logit_strides,
         const Numbers<2>& extent, const Integers<2>& output_size, uintptr_t labels, uintptr_t scores,
         uintptr_t margins, const std::string& path, int threads) {
        check_threads(threads);
        const bool has_images = mask_sizes[0] > 0, has_queries = has_images && mask_sizes[1] > 0;
        semantic_inference(
            {pointer<const void>("masks", masks, has_queries), float_type("mask_type", mask_type), mask_sizes,
             mask_strides, pointer<const void>("logits", logits, has_queries), float_type("logit_type", logit_type),
             classes, logit_strides, extent, output_size, pointer<void>("labels", labels, has_images),
             pointer<float>(scores), pointer<float>(margins),
             choose<SemanticPath>("path", path,
                                  {{"auto", SemanticPath::automatic},
                                   {"dense", SemanticPath::dense},
                                   {"pruned", SemanticPath::pruned}})},
            threads);
      },
      arg("masks"), arg("mask_type"), arg("mask_sizes"), arg("mask_strides"), arg("logits"), arg("logit_type"),
      arg("classes"), arg("logit_strides"), arg("extent"), arg("output_size"), arg("labels"), arg("scores"),
      arg("margins"), arg("path"), arg("threads"), ReleaseGil(),
      "Addresses of mask logits [batch, queries, h, w] and class logits [batch, queries, classes + 1] (strides in "
      "elements; float32, bfloat16 or float16), and of the results [batch, *output_size]: labels (uint8 up to 255 "
      "classes, else int16), float32 scores and margins (0: not wanted). path: auto, dense or pruned.");
  module.def(
      "windowed_semantic",
      [](uintptr_t masks, const std::string& mask_type, const Integers<4>& mask_sizes, const Integers<4>& mask_strides,
         uintptr_t probabilities, int64_t classes, const std::vector<int64_t>& origins, const Integers<2>& window_size,
         const Integers<2>& picture_size, uintptr_t labels, int threads) {
        check_sizes(mask_sizes);
        check_threads(threads);
        if (static_cast<int64_t>(origins.size()) != 2 * mask_sizes[0]) {
          throw std::invalid_argument("origins: expected a row and a column of each window");
        }
        const bool any = mask_sizes[0] > 0 && mask_sizes[1] > 0;
        windowed_semantic({pointer<const void>("masks", masks, any), float_type("mask_type", mask_type), mask_sizes,
                           mask_strides, pointer<const float>("probabilities", probabilities, any), classes,
                           origins.data(), window_size, picture_size, pointer<void>("labels", labels, true)},
                          threads);
      },
      arg("masks"), arg("mask_type"), arg("mask_sizes"), arg("mask_strides"), arg("probabilities"), arg("classes"),
      arg("origins"), arg("window_size"), arg("picture_size"), arg("labels"), arg("threads"), ReleaseGil(),
      "Addresses of mask logits [windows, queries, h, w] (strides in elements), of float32 probabilities [windows, "
      "queries, classes], and of the labels [*picture_size], uint8 up to 255 classes, else int16. origins: row and "
      "column of each window, one after the other.");
}

// upscaling

Upscaling upscaling_of(const Integers<4>& sizes, bool gelu, const std::array<uintptr_t, 3>& weights, float epsilon) {
  check_sizes(sizes);
  const auto [count, height, width, channels] = sizes;
  const auto of = [&](int part) { return pointer<const float>("weights", weights[part], sizes[3] > 0); };
  return {count, height, width, channels, gelu, of(0), of(1), of(2), epsilon};
}

void define_upscaling(py::module_& module) {
  module.def(
      "upscaling",
      [](uintptr_t maps, const std::string& type, const Integers<4>& sizes, bool gelu,
         const std::array<uintptr_t, 3>& weights, float epsilon, uintptr_t result, int threads) {
        check_threads(threads);
        const Upscaling sized = upscaling_of(sizes, gelu, weights, epsilon);
        if (float_or_bfloat16(type) == FloatType::float32) {
          upscaling(sized, pointer<const float>(maps), pointer<float>(result), threads);
        } else {
          upscaling(sized, pointer<const uint16_t>(maps), pointer<uint16_t>(result), threads);
        }
      },
      arg("maps"), arg("type"), arg("sizes"), arg("gelu"), arg("weights"), arg("epsilon"), arg("result"),
      arg("threads"), ReleaseGil(),
      "Addresses of maps and result, float32 or bfloat16, and of the three float32 weights with the shapes in "
      "csrc/upscaling/upscaling.h. sizes: images, height, width, channels.");
  module.def(
      "upscaling_backward",
      [](uintptr_t gradient, uintptr_t maps, const Integers<4>& sizes, bool gelu,
         const std::array<uintptr_t, 3>& weights, float epsilon, uintptr_t by_maps, uintptr_t by_weights, int threads) {
        check_threads(threads);
        upscaling_backward(upscaling_of(sizes, gelu, weights, epsilon), pointer<const float>(gradient),
                           pointer<const float>(maps), pointer<float>(by_maps), pointer<float>(by_weights), threads);
      },
      arg("gradient"), arg("maps"), arg("sizes"), arg("gelu"), arg("weights"), arg("epsilon"), arg("by_maps"),
      arg("by_weights"), arg("threads"), ReleaseGil(),
      "Address of the gradient by the result, arguments of upscaling in float32, and addresses of the gradients by the "
      "maps and by all weights.");
}

// window_attention

WindowAttention window_attention_of(const Integers<7>& sizes, uintptr_t bias, int64_t key_stride) {
  check_sizes(sizes);
  const auto [count, height, width, heads, head_dim, window, shift] = sizes;
  if (window == 0 || shift >= window || key_stride < window * window) {
    throw std::invalid_argument("window: expected > 0, more than the shift and within the rows of the bias");
  }
  return {count, height, width, heads, head_dim, window, shift, pointer<const float>("bias", bias), key_stride};
}

void define_window_attention(py::module_& module) {
  module.def(
      "window_attention",
      [](uintptr_t qkv, uintptr_t padding, const std::string& type, const Integers<7>& sizes, uintptr_t bias,
         int64_t key_stride, uintptr_t result, int threads) {
        check_threads(threads);
        const WindowAttention attention = window_attention_of(sizes, bias, key_stride);
        if (float_or_bfloat16(type) == FloatType::float32) {
          window_attention(attention, pointer<const float>(qkv), pointer<const float>("padding", padding),
                           pointer<float>(result), threads);
        } else {
          window_attention(attention, pointer<const uint16_t>(qkv), pointer<const uint16_t>("padding", padding),
                           pointer<uint16_t>(result), threads);
        }
      },
      arg("qkv"), arg("padding"), arg("type"), arg("sizes"), arg("bias"), arg("key_stride"), arg("result"),
      arg("threads"), ReleaseGil(),
      "Addresses of qkv, padding and result, float32 or bfloat16, and of the float32 bias with the shapes in "
      "csrc/window_attention/window_attention.h. sizes: images, height, width, heads, channels of a head, window, "
      "shift.");
  module.def(
      "window_attention_backward",
      [](uintptr_t gradient, uintptr_t qkv, uintptr_t padding, const std::string& type, const Integers<7>& sizes,
         uintptr_t bias, int64_t key_stride, uintptr_t by_qkv, uintptr_t by_padding, uintptr_t by_bias, int threads) {
        check_threads(threads);
        const WindowAttention attention = window_attention_of(sizes, bias, key_stride);
        float* padding_sums = pointer<float>("by_padding", by_padding);
        float* bias_sums = pointer<float>("by_bias", by_bias);
        if (float_or_bfloat16(type) == FloatType::float32) {
          window_attention_backward(attention, pointer<const float>(gradient), pointer<const float>(qkv),
                                    pointer<const float>("padding", padding), pointer<float>(by_qkv), padding_sums,
                                    bias_sums, threads);
        } else {
          window_attention_backward(attention, pointer<const uint16_t>(gradient), pointer<const uint16_t>(qkv),
                                    pointer<const uint16_t>("padding", padding), pointer<uint16_t>(by_qkv),
                                    padding_sums, bias_sums, threads);
        }
      },
      arg("gradient"), arg("qkv"), arg("padding"), arg("type"), arg("sizes"), arg("bias"), arg("key_stride"),
      arg("by_qkv"), arg("by_padding"), arg("by_bias"), arg("threads"), ReleaseGil(),
      "As window_attention: the gradient of its result to those of qkv, in the same type, of padding and of the bias, "
      "in float32.");
}

}  // namespace
}  // namespace maskformer_fast

PYBIND11_MODULE(_C, module) {
  using namespace maskformer_fast;
  module.doc() = "Compiled operators of maskformer_fast; call them through maskformer_fast.ops.";
#ifdef MF_HAS_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.def("available_isas", &available_isas, "Instruction sets that this processor runs, narrowest first.");
  module.def("use_isa", &use_isa, arg("name"), "Forces the kernels' instruction set, for tests; 'auto': the widest.");
  define_assignment<float>(module, "f32");
  define_assignment<double>(module, "f64");
  define_attention(module);
  define_convolution(module);
  define_deformable_attention(module);
  define_mask_loss(module);
  define_matching_cost(module);
  define_nearest_masks(module);
  define_points(module);
  define_resized_argmax(module);
  define_resized_semantic(module);
  define_rle(module);
  define_segments(module);
  define_semantic(module);
  define_upscaling(module);
  define_window_attention(module);
}
