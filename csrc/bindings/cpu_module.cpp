// Table of contents of fivedp._cpu: each family of kernels binds itself, and so does the planner's arithmetic.
#include <pybind11/pybind11.h>

namespace fivedp {
void bind_attention(pybind11::module_& module);
void bind_copy(pybind11::module_& module);
void bind_experts(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_layout(pybind11::module_& module);
void bind_routing(pybind11::module_& module);
}  // namespace fivedp

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Local arithmetic on the CPU; see fivedp.kernels";
    fivedp::bind_attention(module);
    fivedp::bind_copy(module);
    fivedp::bind_experts(module);
    fivedp::bind_gemm(module);
    fivedp::bind_layout(module);
    fivedp::bind_routing(module);
}
