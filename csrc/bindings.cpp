// maskformer_fast._C: plain pointers, sizes and strides in, so that it needs no torch headers and fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "assignment/assignment.h"
#include "assignment/assignment_cuda.h"
#include "convolution/convolution.h"
#include "common/cpu_isa.h"
#include "mask_loss/mask_loss.h"
#include "matching_cost/matching_cost.h"
#include "segments/segments.h"
#include "rle/rle.h"
#include "semantic/semantic.h"

namespace py = pybind11;

namespace {

using Shape = std::array<int64_t, 3>;
using maskformer_fast::AssignmentBatch;
using maskformer_fast::FloatType;
using maskformer_fast::MaskWindow;
using maskformer_fast::SemanticPath;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* pointer(const char* name, uintptr_t address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + ": expected a pointer, got null");
  return pointer<T>(address);
}

template <size_t N>
void check_sizes(const std::array<int64_t, N>& sizes) {
  for (const int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("sizes: expected >= 0, got " + std::to_string(size));
  }
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected >= 1, got " + std::to_string(threads));
}

template <class T>
AssignmentBatch<T> assignment_batch(uintptr_t cost, const Shape& sizes, const Shape& strides, uintptr_t counts,
                                    uintptr_t row_of) {
  check_sizes(sizes);
  const bool has_result = sizes[0] > 0 && sizes[2] > 0;
  if (has_result && row_of == 0) throw std::invalid_argument("row_of: expected a pointer, got null");
  if (has_result && sizes[1] > 0 && cost == 0) throw std::invalid_argument("cost: expected a pointer, got null");
  return {pointer<const T>(cost), sizes, strides, pointer<const int64_t>(counts), pointer<int64_t>(row_of)};
}

template <class T>
void linear_sum_assignment(uintptr_t cost, const Shape& sizes, const Shape& strides, uintptr_t counts, uintptr_t row_of,
                           int threads) {
  const AssignmentBatch<T> batch = assignment_batch<T>(cost, sizes, strides, counts, row_of);
  check_threads(threads);
  maskformer_fast::assign_batch(batch, threads);
}

template <class T>
void define_linear_sum_assignment(py::module_& module, const std::string& type) {
  module.def(("linear_sum_assignment_" + type).c_str(), &linear_sum_assignment<T>, py::arg("cost"), py::arg("sizes"),
             py::arg("strides"), py::arg("counts"), py::arg("row_of"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "Addresses of cost [batch, rows, columns] (strides in elements), int64 counts [batch] or 0, and the int64 "
             "result [batch, columns].");
}

#ifdef MF_HAS_CUDA
template <class T>
int64_t assignment_scratch_bytes(uintptr_t cost, const Shape& sizes, const Shape& strides, uintptr_t counts,
                                 uintptr_t row_of, int device) {
  return maskformer_fast::assignment_scratch_bytes(assignment_batch<T>(cost, sizes, strides, counts, row_of), device);
}

template <class T>
void linear_sum_assignment_cuda(uintptr_t cost, const Shape& sizes, const Shape& strides, uintptr_t counts,
                                uintptr_t row_of, uintptr_t scratch, int64_t scratch_bytes, int device,
                                uintptr_t stream) {
  maskformer_fast::assign_batch_cuda(assignment_batch<T>(cost, sizes, strides, counts, row_of), pointer<void>(scratch),
                                     scratch_bytes, device, pointer<void>(stream));
}

template <class T>
void define_linear_sum_assignment_cuda(py::module_& module, const std::string& type) {
  module.def(("assignment_scratch_bytes_" + type).c_str(), &assignment_scratch_bytes<T>, py::arg("cost"),
             py::arg("sizes"), py::arg("strides"), py::arg("counts"), py::arg("row_of"), py::arg("device"),
             "Bytes of scratch that linear_sum_assignment_cuda needs for the same arguments.");
  module.def(("linear_sum_assignment_cuda_" + type).c_str(), &linear_sum_assignment_cuda<T>, py::arg("cost"),
             py::arg("sizes"), py::arg("strides"), py::arg("counts"), py::arg("row_of"), py::arg("scratch"),
             py::arg("scratch_bytes"), py::arg("device"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
             "As linear_sum_assignment, addresses on the device; starts it on the stream and does not wait.");
}
#endif

MaskWindow mask_window(uintptr_t logits, const std::array<int64_t, 4>& sizes, const Shape& strides,
                       const std::array<double, 2>& extent, const std::array<int64_t, 2>& output) {
  check_sizes(sizes);
  for (const int64_t side : output) {
    if (side < 1) throw std::invalid_argument("output: expected positive sides, got " + std::to_string(side));
  }
  for (const double side : extent) {
    if (!(side > 0)) throw std::invalid_argument("extent: expected positive sides, got " + std::to_string(side));
  }
  return {pointer<const float>(logits), sizes, strides, extent, output};
}

void panoptic_inference(uintptr_t logits, const std::array<int64_t, 4>& sizes, const Shape& strides,
                        const std::array<double, 2>& extent, const std::array<int64_t, 2>& output, uintptr_t scores,
                        uintptr_t categories, uintptr_t is_thing, int64_t classes, double overlap_threshold,
                        const std::string& rule, uintptr_t id_map, uintptr_t ids, uintptr_t areas, int threads) {
  check_threads(threads);
  maskformer_fast::infer_panoptic(mask_window(logits, sizes, strides, extent, output),
                                  {pointer<const float>(scores), pointer<const int64_t>(categories),
                                   pointer<const bool>(is_thing), classes, overlap_threshold, rule},
                                  {pointer<int32_t>(id_map), pointer<int32_t>(ids), pointer<int64_t>(areas)}, threads);
}

void instance_inference(uintptr_t logits, const std::array<int64_t, 4>& sizes, const Shape& strides,
                        const std::array<double, 2>& extent, const std::array<int64_t, 2>& output, uintptr_t masks,
                        uintptr_t areas, uintptr_t boxes, uintptr_t scores, int threads) {
  check_threads(threads);
  maskformer_fast::infer_instances(
      mask_window(logits, sizes, strides, extent, output),
      {pointer<uint8_t>(masks), pointer<int64_t>(areas), pointer<float>(boxes), pointer<float>(scores)}, threads);
}

py::list encode_packed_masks(uintptr_t masks, const Shape& sizes, int threads) {
  check_threads(threads);
  const auto [count, height, width] = sizes;
  if (count < 0 || height < 1 || width < 1) throw std::invalid_argument("sizes: expected masks that have pixels");
  std::vector<std::string> encoded;
  {
    py::gil_scoped_release release;
    encoded = maskformer_fast::encode_masks(pointer<const uint8_t>(masks), count, height, width, threads);
  }
  py::list result;
  for (const std::string& counts : encoded) result.append(py::bytes(counts));
  return result;
}

void define_segments(py::module_& module) {
  module.def("panoptic_inference", &panoptic_inference, py::arg("logits"), py::arg("sizes"), py::arg("strides"),
             py::arg("extent"), py::arg("output"), py::arg("scores"), py::arg("categories"), py::arg("is_thing"),
             py::arg("classes"), py::arg("overlap_threshold"), py::arg("rule"), py::arg("id_map"), py::arg("ids"),
             py::arg("areas"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of float32 logits [batch, queries, rows, columns] (strides in floats, columns adjacent), of "
             "contiguous scores, categories, is_thing, and of the results.");
  module.def("instance_inference", &instance_inference, py::arg("logits"), py::arg("sizes"), py::arg("strides"),
             py::arg("extent"), py::arg("output"), py::arg("masks"), py::arg("areas"), py::arg("boxes"),
             py::arg("scores"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of float32 logits [batch, queries, rows, columns] (strides in floats, columns adjacent) and "
             "of the results.");
  module.def("encode_packed_masks", &encode_packed_masks, py::arg("masks"), py::arg("sizes"), py::arg("threads"),
             "Address of contiguous packed masks, their count, height and width in pixels -> compressed COCO counts.");
}

void matching_cost(uintptr_t class_logits, uintptr_t embeddings, uintptr_t pixels,
                   const std::array<int64_t, 4>& pixel_strides, uintptr_t labels, uintptr_t counts, uintptr_t masks,
                   uintptr_t valid_sizes, const std::array<int64_t, 10>& sizes, const std::array<double, 3>& weights,
                   const std::array<double, 3>& focal, uintptr_t cost, int threads) {
  check_sizes(sizes);
  check_threads(threads);
  const auto [layers, images, queries, classes, depth, height, width, slots, input_height, input_width] = sizes;
  const bool any = layers > 0 && images > 0 && queries > 0 && slots > 0;
  if (any && (height == 0 || width == 0 || input_height == 0 || input_width == 0 || classes == 0)) {
    throw std::invalid_argument("sizes: expected pixels and classes, got none");
  }
  if (!any) return;
  maskformer_fast::MatchingBatch batch{};
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
  batch.loss = {static_cast<float>(focal[0]), static_cast<float>(focal[1]), static_cast<float>(focal[2])};
  batch.cost = pointer<float>("cost", cost);
  maskformer_fast::matching_cost(batch, threads);
}

using MaskAddresses = std::array<uintptr_t, 4>;  // logits, masks, rows, valid_sizes

maskformer_fast::MaskPairs mask_pairs(const MaskAddresses& addresses, const std::array<int64_t, 6>& sizes,
                                      const std::array<double, 3>& focal) {
  check_sizes(sizes);
  const auto [pairs, height, width, targets, input_height, input_width] = sizes;
  if (pairs > 0 && (height == 0 || width == 0 || input_height == 0 || input_width == 0)) {
    throw std::invalid_argument("sizes: expected pixels, got none");
  }
  if (pairs > 0 && (addresses[0] == 0 || addresses[2] == 0)) {
    throw std::invalid_argument("logits, rows: expected pointers, got null");
  }
  maskformer_fast::MaskPairs batch{};
  batch.pairs = pairs;
  batch.height = height;
  batch.width = width;
  batch.targets = targets;
  batch.input_height = input_height;
  batch.input_width = input_width;
  batch.logits = pointer<const float>(addresses[0]);
  batch.masks = pointer<const uint8_t>(addresses[1]);
  batch.rows = pointer<const int64_t>(addresses[2]);
  batch.valid_sizes = pointer<const int64_t>(addresses[3]);
  batch.loss = {static_cast<float>(focal[0]), static_cast<float>(focal[1]), static_cast<float>(focal[2])};
  return batch;
}

void mask_sums(const MaskAddresses& addresses, const std::array<int64_t, 6>& sizes,
               const std::array<double, 3>& focal, uintptr_t sums, int threads) {
  check_threads(threads);
  maskformer_fast::mask_sums(mask_pairs(addresses, sizes, focal), pointer<float>(sums), threads);
}

void mask_sums_backward(uintptr_t upstream, const MaskAddresses& addresses, const std::array<int64_t, 6>& sizes,
                        const std::array<double, 3>& focal, uintptr_t gradient, int threads) {
  check_threads(threads);
  maskformer_fast::mask_sums_backward(mask_pairs(addresses, sizes, focal), pointer<const float>(upstream),
                                      pointer<float>(gradient), threads);
}

void define_mask_sums(py::module_& module) {
  module.def("mask_sums", &mask_sums, py::arg("addresses"), py::arg("sizes"), py::arg("focal"), py::arg("sums"),
             py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of what csrc/mask_loss/mask_loss.h names: logits, masks, rows and valid_sizes (0: padding counts), "
             "all contiguous, and of the float32 sums. sizes: pairs, height, width, targets, input height and width; "
             "focal: weight on, weight off, exponent.");
  module.def("mask_sums_backward", &mask_sums_backward, py::arg("upstream"), py::arg("addresses"), py::arg("sizes"),
             py::arg("focal"), py::arg("gradient"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Address of the gradient by the sums, then as mask_sums, and of the gradient by the logits.");
}

template <class Enum>
Enum choose(const std::string& value, const char* name,
            const std::initializer_list<std::pair<const char*, Enum>>& known) {
  std::string names;
  for (const auto& [text, result] : known) {
    if (value == text) return result;
    names += std::string(names.empty() ? "" : ", ") + text;
  }
  throw std::invalid_argument(std::string(name) + ": expected one of " + names + ", got " + value);
}

FloatType float_type(const std::string& value, const char* name) {
  return choose<FloatType>(
      value, name,
      {{"float32", FloatType::float32}, {"bfloat16", FloatType::bfloat16}, {"float16", FloatType::float16}});
}

void semantic_inference(uintptr_t masks, const std::string& mask_type, const std::array<int64_t, 4>& mask_sizes,
                        const std::array<int64_t, 4>& mask_strides, uintptr_t logits, const std::string& logit_type,
                        int64_t classes, const std::array<int64_t, 3>& logit_strides,
                        const std::array<double, 2>& extent, const std::array<int64_t, 2>& output_size,
                        uintptr_t labels, uintptr_t scores, uintptr_t margins, const std::string& path, int threads) {
  if (mask_sizes[0] > 0 && labels == 0) throw std::invalid_argument("labels: expected a pointer, got null");
  if (mask_sizes[0] > 0 && mask_sizes[1] > 0 && (masks == 0 || logits == 0)) {
    throw std::invalid_argument("masks, logits: expected pointers, got null");
  }
  const SemanticPath chosen = choose<SemanticPath>(
      path, "path",
      {{"auto", SemanticPath::automatic}, {"dense", SemanticPath::dense}, {"pruned", SemanticPath::pruned}});
  maskformer_fast::semantic_inference(
      {pointer<const void>(masks), float_type(mask_type, "mask_type"), mask_sizes, mask_strides,
       pointer<const void>(logits), float_type(logit_type, "logit_type"), classes, logit_strides, extent, output_size,
       pointer<void>(labels), pointer<float>(scores), pointer<float>(margins), chosen},
      threads);
}

void convolve_winograd(uintptr_t images, const std::string& type, const std::array<int64_t, 5>& sizes,
                       uintptr_t weights, uintptr_t bias, bool relu, uintptr_t result, int threads) {
  check_sizes(sizes);
  check_threads(threads);
  const int64_t count = sizes[0];
  const maskformer_fast::WinogradConvolution conv{
      sizes[1], sizes[2], sizes[3], sizes[4], pointer<const float>("weights", weights), pointer<const float>(bias),
      relu};
  const auto run = [&](auto element) {
    using Element = decltype(element);
    maskformer_fast::convolve_winograd(conv, pointer<const Element>(images), count, pointer<Element>(result), threads);
  };
  const FloatType known = choose<FloatType>(type, "type", {{"float32", FloatType::float32},
                                                           {"bfloat16", FloatType::bfloat16}});
  known == FloatType::float32 ? run(float{}) : run(uint16_t{});
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of maskformer_fast; call them through maskformer_fast.ops.";
  define_linear_sum_assignment<float>(module, "f32");
  define_linear_sum_assignment<double>(module, "f64");
#ifdef MF_HAS_CUDA
  module.attr("has_cuda") = true;
  define_linear_sum_assignment_cuda<float>(module, "f32");
  define_linear_sum_assignment_cuda<double>(module, "f64");
#else
  module.attr("has_cuda") = false;
#endif
  define_segments(module);
  define_mask_sums(module);
  module.def("matching_cost", &matching_cost, py::arg("class_logits"), py::arg("embeddings"), py::arg("pixels"),
             py::arg("pixel_strides"), py::arg("labels"), py::arg("counts"), py::arg("masks"), py::arg("valid_sizes"),
             py::arg("sizes"), py::arg("weights"), py::arg("focal"), py::arg("cost"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "Addresses of what csrc/matching_cost/matching_cost.h names (pixels 0: embeddings are mask logits; valid_sizes 0: "
             "padding counts). sizes: layers, images, queries, classes, depth, height, width, slots, input height and "
             "width; weights: class, mask, dice; focal: weight on, weight off, exponent.");
  module.def("semantic_inference", &semantic_inference, py::arg("masks"), py::arg("mask_type"), py::arg("mask_sizes"),
             py::arg("mask_strides"), py::arg("logits"), py::arg("logit_type"), py::arg("classes"),
             py::arg("logit_strides"), py::arg("extent"), py::arg("output_size"), py::arg("labels"), py::arg("scores"),
             py::arg("margins"), py::arg("path"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of mask logits [batch, queries, h, w] and class logits [batch, queries, classes + 1] (strides "
             "in elements; float32, bfloat16 or float16), and of the results [batch, *output_size]: labels (uint8 up "
             "to 255 classes, else int16), float32 scores and margins (0: not wanted). Path: auto, dense or pruned.");
  module.def("convolve_winograd", &convolve_winograd, py::arg("images"), py::arg("type"), py::arg("sizes"),
             py::arg("weights"), py::arg("bias"), py::arg("relu"), py::arg("result"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "Addresses of images and result, channels innermost, float32 or bfloat16, and of float32 weights and bias "
             "(0: none) as csrc/convolution/kernels.h has them. sizes: images, height, width, channels in and out.");
  module.def("available_isas", &maskformer_fast::available_isas, "Instruction sets that this processor runs.");
  module.def("use_isa", &maskformer_fast::use_isa, py::arg("name"),
             "For tests: force the kernels' instruction set; 'auto' takes the widest.");
}
