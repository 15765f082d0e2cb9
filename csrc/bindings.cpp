// maskformer_fast._C: plain pointers, sizes and strides in, so that it needs no torch headers and fits every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "assignment_cpu.h"
#include "cpu_isa.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of maskformer_fast; call them through maskformer_fast.ops.";
  define_linear_sum_assignment<float>(module, "linear_sum_assignment_f32");
  define_linear_sum_assignment<double>(module, "linear_sum_assignment_f64");
  module.def("available_isas", &maskformer_fast::available_isas, "Instruction sets that this processor runs.");
  module.def("use_isa", &maskformer_fast::use_isa, py::arg("name"),
             "For tests: force the kernels' instruction set; 'auto' takes the widest.");
}
