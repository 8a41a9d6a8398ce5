// Table of contents of fivedp._cuda, and of fivedp._cuda_emulated, which has the same functions on NumPy arrays.
#include <pybind11/pybind11.h>

#ifdef FIVEDP_CUDA_EMULATED
#include "cuda/emulation/device.hpp"
#define FIVEDP_CUDA_MODULE _cuda_emulated
#else
#define FIVEDP_CUDA_MODULE _cuda
#endif

namespace fivedp {
void bind_cuda_dispatch(pybind11::module_& module);
void bind_cuda_expert_rows(pybind11::module_& module);
void bind_cuda_pointwise(pybind11::module_& module);
void bind_cuda_routing(pybind11::module_& module);
}  // namespace fivedp

PYBIND11_MODULE(FIVEDP_CUDA_MODULE, module) {
    module.doc() = "Local arithmetic on a GPU; see fivedp.kernels.cuda";
    fivedp::bind_cuda_dispatch(module);
    fivedp::bind_cuda_expert_rows(module);
    fivedp::bind_cuda_pointwise(module);
    fivedp::bind_cuda_routing(module);
#ifdef FIVEDP_CUDA_EMULATED
    module.def("set_seed", &fivedp::emulation::set_seed);
#endif
}
