#include "common/cpu_features.hpp"

namespace fivedp {

static CpuFeatures detect() {
    CpuFeatures found;
#ifdef FIVEDP_X86
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
    __builtin_cpu_init();
    found.avx2_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx");
    found.avx512 = found.avx2_fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return found;
}

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

}  // namespace fivedp
