// Kernels with a fault each in the use of cuda/hopper.cuh, and without it; and one product, for a look at its layouts.
// Only in the emulated extension.
#include "cuda/hopper.cuh"

namespace fivedp {
namespace {

struct Shared {
    char left[64 * 128], right[2][64 * 128];  // rows of 64 elements
    Barrier landed;
};

FIVEDP_DEVICE Shared& shared_of_block() {
    char* const from = dynamic_shared();
    return *reinterpret_cast<Shared*>(from + (swizzle_bytes - shared_address(from) % swizzle_bytes) % swizzle_bytes);
}

enum Fault {
    none,
    no_phase,
    no_wait,
    no_product_wait,
    overwritten,
    no_publish,
    no_fence,
    no_turn,
    not_shown,
    late_bytes
};

// d (64, n) = a (64, 64) b, with b (n, 64) as rows of k or (64, n) as columns of k; in the latter case `a` may be in
// registers.
template <class T, int n, bool b_is_columns, bool a_in_registers>
FIVEDP_KERNEL(128, 1)
multiply(const TensorMap a, const TensorMap b, float* d, int fault) {
    Shared& shared = shared_of_block();
    if (thread() == 0) {
        init_barrier(&shared.landed, 1);
        publish_barriers();
    }
    sync_block();
    if (thread() == 0) {
        constexpr int boxes = (n + 63) / 64;
        load_acquire(reinterpret_cast<const int*>(d));  // as if a flag were there
        if (fault != not_shown) show_to_boxes();
        const int late = fault == late_bytes ? 64 * 128 : 0;
        arrive_expecting(&shared.landed, (1 + boxes) * 64 * 128 - late);
        if (late > 0) expect_bytes(&shared.landed, late);  // the phase may be over
        copy_box(shared.left, &a, &shared.landed, 0, 0, 0, 0);
        for (int i = 0; i < boxes; ++i)
            copy_box(shared.right[i], &b, &shared.landed, b_is_columns ? 64 * i : 0, b_is_columns ? 0 : 64 * i, 0, 0);
    }
    if (fault != no_wait) wait_for_phase(&shared.landed, 0);
    if (fault == no_phase) wait_for_phase(&shared.landed, 1);
    if (fault == no_turn && thread() < 64) sync_some(1, 128);
    if (fault == no_publish) {  // writes zeros that are never made known
        reinterpret_cast<Vec16<T>*>(shared.left)[thread()] = Vec16<T>{};
        sync_block();
    }

    float sums[n / 8][4];
    std::uint32_t left[4][4];
    const std::uint64_t right = swizzled_matrix(shared.right[0], swizzle_bytes, 64 * 128);
    if (b_is_columns)
        for (auto& four : sums)
            for (float& sum : four) sum = 0;
    if (a_in_registers) {
        const int row = 16 * warp() + lane() / 4, column = 2 * (lane() % 4);
        for (int k = 0; k < 4; ++k)
            for (int i = 0; i < 4; ++i) {
                const int r = row + 8 * (i % 2), chunk = (2 * k + i / 2) ^ (r % 8);
                left[k][i] = *reinterpret_cast<const std::uint32_t*>(shared.left + r * 128 + chunk * 16 + 2 * column);
            }
    }
    if (fault != no_fence) open_products();
    for (int k = 0; k < 4; ++k) {
        const std::uint64_t left_rows = further(swizzled_matrix(shared.left, swizzle_bytes, 0), 32 * k);
        if constexpr (a_in_registers)
            start_product(T{}, sums, left[k], further(right, 2048 * k));
        else if constexpr (b_is_columns)
            start_product(T{}, sums, left_rows, further(right, 2048 * k));
        else
            start_product(T{}, sums, left_rows, further(right, 32 * k), k > 0);
    }
    commit_products();
    if (fault == overwritten) {
        sync_block();
        if (thread() == 0) {
            arrive_expecting(&shared.landed, 64 * 128);
            copy_box(shared.right[0], &a, &shared.landed, 0, 0, 0, 0);
        }
        wait_for_phase(&shared.landed, 1);
    }
    if (fault != no_product_wait) wait_for_products<0>();
    for (int j = 0; j < n / 8; ++j)
        for (int e = 0; e < 4; ++e)
            d[(16 * warp() + lane() / 4 + 8 * (e / 2)) * n + 8 * j + 2 * (lane() % 4) + e % 2] = sums[j][e];
    if (fault == no_product_wait) wait_for_products<0>();
}

template <class T, int n, bool b_is_columns, bool a_in_registers>
void start(DeviceType type, const void* a, const void* b, float* d, int fault) {
    const auto boxed = [&](const void* data, std::int64_t rows, std::int64_t columns) {
        return tensor_map({type, data, columns, {rows, 1, 1}, {2 * columns, 2 * columns, 2 * columns}, 64});
    };
    launch(multiply<T, n, b_is_columns, a_in_registers>, 1, 1, 1, 128, sizeof(Shared) + swizzle_bytes, nullptr,
           boxed(a, 64, 64), b_is_columns ? boxed(b, 64, n) : boxed(b, n, 64), d, fault);
}

template <class T, int n>
void start_some(DeviceType type, const void* a, const void* b, float* d, bool b_is_columns, bool a_in_registers,
                int fault) {
    if (a_in_registers)
        start<T, n, true, true>(type, a, b, d, fault);
    else
        (b_is_columns ? start<T, n, true, false> : start<T, n, false, false>)(type, a, b, d, fault);
}

template <class T>
void start_any(DeviceType type, const void* a, const void* b, float* d, int n, bool b_is_columns, bool a_in_registers,
               int fault) {
    (n == 32   ? start_some<T, 32>
     : n == 64 ? start_some<T, 64>
               : start_some<T, 128>)(type, a, b, d, b_is_columns, a_in_registers, fault);
}

}  // namespace

// `n` is 32, 64 or 128; a and b are of 16 bits.
void run_product(bool bf16, const void* a, const void* b, float* d, int n, bool b_is_columns, bool a_in_registers,
                 int fault) {
    if (bf16)
        start_any<Bf16>(DeviceType::bf16, a, b, d, n, b_is_columns, a_in_registers, fault);
    else
        start_any<Half>(DeviceType::f16, a, b, d, n, b_is_columns, a_in_registers, fault);
}

}  // namespace fivedp
