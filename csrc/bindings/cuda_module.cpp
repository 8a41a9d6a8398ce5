// Table of contents of fivedp._cuda, and of fivedp._cuda_emulated, which has the same functions on NumPy arrays.
#include <pybind11/pybind11.h>

#ifdef FIVEDP_CUDA_EMULATED
#include "cuda/emulation/device.hpp"
#define FIVEDP_CUDA_MODULE _cuda_emulated
#else
#define FIVEDP_CUDA_MODULE _cuda
#endif

namespace fivedp {
#ifdef FIVEDP_CUDA_EMULATED
void run_fault(int which, const float* x, float* y, int n, bool faulty);
void run_product(bool bf16, const void* a, const void* b, float* d, int n, bool b_is_columns, bool a_in_registers,
                 int fault);
#endif
void bind_cuda_activation(pybind11::module_& module);
void bind_cuda_adamw(pybind11::module_& module);
void bind_cuda_attention(pybind11::module_& module);
void bind_cuda_cross_entropy(pybind11::module_& module);
void bind_cuda_dispatch(pybind11::module_& module);
void bind_cuda_expert_rows(pybind11::module_& module);
void bind_cuda_gemm(pybind11::module_& module);
void bind_cuda_grouped(pybind11::module_& module);
void bind_cuda_norm(pybind11::module_& module);
void bind_cuda_rotary(pybind11::module_& module);
void bind_cuda_routing(pybind11::module_& module);
void bind_cuda_tree_sum(pybind11::module_& module);
}  // namespace fivedp

PYBIND11_MODULE(FIVEDP_CUDA_MODULE, module) {
    module.doc() = "Local arithmetic on a GPU; see fivedp.kernels.cuda";
    fivedp::bind_cuda_activation(module);
    fivedp::bind_cuda_adamw(module);
    fivedp::bind_cuda_attention(module);
    fivedp::bind_cuda_cross_entropy(module);
    fivedp::bind_cuda_dispatch(module);
    fivedp::bind_cuda_expert_rows(module);
    fivedp::bind_cuda_gemm(module);
    fivedp::bind_cuda_grouped(module);
    fivedp::bind_cuda_norm(module);
    fivedp::bind_cuda_rotary(module);
    fivedp::bind_cuda_routing(module);
    fivedp::bind_cuda_tree_sum(module);
#ifdef FIVEDP_CUDA_EMULATED
    module.def("set_seed", &fivedp::emulation::set_seed);
    module.def("run_fault", [](int which, std::uintptr_t x, std::uintptr_t y, int n, bool faulty) {
        fivedp::run_fault(which, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n, faulty);
    });
    module.def("run_product", [](bool bf16, std::uintptr_t a, std::uintptr_t b, std::uintptr_t d, int n,
                                 bool b_is_columns, bool a_in_registers, int fault) {
        fivedp::run_product(bf16, reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                            reinterpret_cast<float*>(d), n, b_is_columns, a_in_registers, fault);
    });
#endif
}
