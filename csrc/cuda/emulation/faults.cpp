// Kernels with a fault each, and without it: what the emulated GPU must notice. Only in the emulated extension.
#include "cuda/matrix.cuh"

namespace fivedp {
namespace {

// Reverses `n` floats through shared memory.
FIVEDP_KERNEL(1024, 1)
reverse(const float* x, float* y, bool faulty) {
    float* const shared = reinterpret_cast<float*>(dynamic_shared());
    shared[thread()] = x[thread()];
    if (!faulty) sync_block();
    y[thread()] = shared[threads() - 1 - thread()];
}

// Half of the threads come to a barrier that the others never reach.
FIVEDP_KERNEL(1024, 1)
half_barrier(const float* x, float* y, bool faulty) {
    y[thread()] = x[thread()];
    if (!faulty || thread() < threads() / 2) sync_block();
}

// Copies 4 floats a thread through shared memory, and may forget to wait for them.
FIVEDP_KERNEL(1024, 1)
copy(const float* x, float* y, bool faulty) {
    float* const shared = reinterpret_cast<float*>(dynamic_shared()) + 4 * thread();
    copy_async_16(shared, x + 4 * thread(), 16);
    commit_copies();
    if (!faulty) wait_for_copies<0>();
    for (int i = 0; i < 4; ++i) y[4 * thread() + i] = shared[i];
}

// Reads shared memory that nobody wrote.
FIVEDP_KERNEL(1024, 1)
unwritten(const float* x, float* y, bool faulty) {
    float* const shared = reinterpret_cast<float*>(dynamic_shared());
    if (!faulty) shared[thread()] = x[thread()];
    y[thread()] = shared[thread()];
}

}  // namespace

void run_fault(int which, const float* x, float* y, int n, bool faulty) {
    void (*const kernels[])(const float*, float*, bool) = {reverse, half_barrier, copy, unwritten};
    launch(kernels[which], 1, 1, 1, which == 2 ? n / 4 : n, 4 * n, nullptr, x, y, faulty);
}

}  // namespace fivedp
