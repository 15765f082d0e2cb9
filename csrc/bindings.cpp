// maskformer_fast._C: plain pointers, sizes and strides in, so that it needs no torch headers and fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "assignment_cpu.h"
#include "cpu_isa.h"
#include "matching_cpu.h"

namespace py = pybind11;

namespace {

using Shape = std::array<int64_t, 3>;

template <class T>
void linear_sum_assignment(uintptr_t cost, const Shape& sizes, const Shape& strides, uintptr_t counts, uintptr_t row_of,
                           int threads) {
  for (const int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("sizes: expected >= 0, got " + std::to_string(size));
  }
  if (threads < 1) throw std::invalid_argument("threads: expected >= 1, got " + std::to_string(threads));
  const bool has_result = sizes[0] > 0 && sizes[2] > 0;
  if (has_result && row_of == 0) throw std::invalid_argument("row_of: expected a pointer, got null");
  if (has_result && sizes[1] > 0 && cost == 0) throw std::invalid_argument("cost: expected a pointer, got null");
  maskformer_fast::assign_batch<T>({reinterpret_cast<const T*>(cost), sizes, strides,
                                    reinterpret_cast<const int64_t*>(counts), reinterpret_cast<int64_t*>(row_of)},
                                   threads);
}

template <class T>
void define_linear_sum_assignment(py::module_& module, const char* name) {
  module.def(name, &linear_sum_assignment<T>, py::arg("cost"), py::arg("sizes"), py::arg("strides"), py::arg("counts"),
             py::arg("row_of"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of cost [batch, rows, columns] (strides in elements), int64 counts [batch] or 0, and the int64 "
             "result [batch, columns].");
}

template <class T>
const T* pointer(const char* name, uintptr_t address, bool needed) {
  if (needed && address == 0) throw std::invalid_argument(std::string(name) + ": expected a pointer, got null");
  return reinterpret_cast<const T*>(address);
}

void matching_cost(uintptr_t class_logits, uintptr_t embeddings, uintptr_t pixels,
                   const std::array<int64_t, 4>& pixel_strides, uintptr_t labels, uintptr_t counts, uintptr_t masks,
                   uintptr_t valid_sizes, const std::array<int64_t, 10>& sizes, const std::array<double, 3>& weights,
                   const std::array<double, 3>& focal, uintptr_t cost, int threads) {
  for (const int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument("sizes: expected >= 0, got " + std::to_string(size));
  }
  if (threads < 1) throw std::invalid_argument("threads: expected >= 1, got " + std::to_string(threads));
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
  batch.class_logits = pointer<float>("class_logits", class_logits, true);
  batch.embeddings = pointer<float>("embeddings", embeddings, true);
  batch.pixels = pointer<float>("pixels", pixels, false);
  batch.depth = depth;
  batch.pixel_strides = pixel_strides;
  batch.labels = pointer<int64_t>("labels", labels, true);
  batch.counts = pointer<int64_t>("counts", counts, true);
  batch.masks = pointer<uint8_t>("masks", masks, true);
  batch.valid_sizes = pointer<int64_t>("valid_sizes", valid_sizes, false);
  batch.class_weight = weights[0];
  batch.mask_weight = weights[1];
  batch.dice_weight = weights[2];
  batch.loss = {static_cast<float>(focal[0]), static_cast<float>(focal[1]), static_cast<float>(focal[2])};
  batch.cost = const_cast<float*>(pointer<float>("cost", cost, true));
  maskformer_fast::matching_cost(batch, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of maskformer_fast; call them through maskformer_fast.ops.";
  define_linear_sum_assignment<float>(module, "linear_sum_assignment_f32");
  define_linear_sum_assignment<double>(module, "linear_sum_assignment_f64");
  module.def("matching_cost", &matching_cost, py::arg("class_logits"), py::arg("embeddings"), py::arg("pixels"),
             py::arg("pixel_strides"), py::arg("labels"), py::arg("counts"), py::arg("masks"), py::arg("valid_sizes"),
             py::arg("sizes"), py::arg("weights"), py::arg("focal"), py::arg("cost"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>(),
             "Addresses of what csrc/matching_cpu.h names (pixels 0: embeddings are mask logits; valid_sizes 0: padding "
             "counts). sizes: layers, images, queries, classes, depth, height, width, slots, input height and width; "
             "weights: class, mask, dice; focal: weight on, weight off, exponent.");
  module.def("available_isas", &maskformer_fast::available_isas, "Instruction sets that this processor runs.");
  module.def("use_isa", &maskformer_fast::use_isa, py::arg("name"),
             "For tests: force the kernels' instruction set; 'auto' takes the widest.");
}
