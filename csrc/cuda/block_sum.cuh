// A sum over the threads of a block, in a fixed tree: lanes by halves, then warps by halves.
#pragma once

#include "cuda/device.cuh"

namespace fivedp {

template <class T>
FIVEDP_DEVICE T warp_sum(T value) {
    FIVEDP_UNROLL
    for (int half = 16; half > 0; half /= 2) value += warp_xor(value, half);
    return value;
}

// All threads get the sum; `room` holds one value for each warp and may be used again after the next barrier.
template <class T>
FIVEDP_DEVICE T block_sum(T value, T* room) {
    value = warp_sum(value);
    const int n_warps = threads() / 32;
    if (lane() == 0) room[thread() / 32] = value;
    sync_block();
    value = lane() < n_warps ? room[lane()] : T(0);
    return warp_sum(value);
}

}  // namespace fivedp
