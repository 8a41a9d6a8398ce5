// For tests: the tiles of avx512, compiled for AVX2.
#define FIVEDP_ISA avx512_emulated
#define FIVEDP_VECTOR_BYTES 64
#define FIVEDP_TILE_ROWS 9
#define FIVEDP_TILE_VECTORS 3
#define FIVEDP_ATTENTION_ROWS 6
#define FIVEDP_ATTENTION_VECTORS 4
#include "cpu/isa_kernels.hpp"
