// What this CPU (and its operating system) can execute, asked once.
#pragma once

namespace fivedp {

struct CpuFeatures {
    bool avx2_fma = false;     // AVX2, FMA and F16C
    bool avx512 = false;       // AVX-512 F, BW, VL and DQ, besides the above
    bool avx512_bf16 = false;  // AVX512-BF16, besides the above
};

const CpuFeatures& cpu_features();

}  // namespace fivedp
