// maskformer_fast._C: plain pointers, sizes and strides in, so that it needs no torch headers and fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "assignment_cpu.h"
#include "cpu_isa.h"
#include "semantic.h"

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

using maskformer_fast::FloatType;
using maskformer_fast::SemanticPath;

template <class Enum>
Enum choose(const std::string& value, const char* name, const std::initializer_list<std::pair<const char*, Enum>>& known) {
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
      {reinterpret_cast<const void*>(masks), float_type(mask_type, "mask_type"), mask_sizes, mask_strides,
       reinterpret_cast<const void*>(logits), float_type(logit_type, "logit_type"), classes, logit_strides, extent,
       output_size, reinterpret_cast<void*>(labels), reinterpret_cast<float*>(scores),
       reinterpret_cast<float*>(margins), chosen},
      threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of maskformer_fast; call them through maskformer_fast.ops.";
  define_linear_sum_assignment<float>(module, "linear_sum_assignment_f32");
  define_linear_sum_assignment<double>(module, "linear_sum_assignment_f64");
  module.def("semantic_inference", &semantic_inference, py::arg("masks"), py::arg("mask_type"), py::arg("mask_sizes"),
             py::arg("mask_strides"), py::arg("logits"), py::arg("logit_type"), py::arg("classes"),
             py::arg("logit_strides"), py::arg("extent"), py::arg("output_size"), py::arg("labels"), py::arg("scores"),
             py::arg("margins"), py::arg("path"), py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
             "Addresses of mask logits [batch, queries, h, w] and class logits [batch, queries, classes + 1] (strides "
             "in elements; float32, bfloat16 or float16), and of the results [batch, *output_size]: labels (uint8 up "
             "to 255 classes, else int16), float32 scores and margins (0: not wanted). Path: auto, dense or pruned.");
  module.def("available_isas", &maskformer_fast::available_isas, "Instruction sets that this processor runs.");
  module.def("use_isa", &maskformer_fast::use_isa, py::arg("name"),
             "For tests: force the kernels' instruction set; 'auto' takes the widest.");
}
