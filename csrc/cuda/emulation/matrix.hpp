// The matrix instructions of cuda/matrix.cuh for the emulation: what the PTX manual says of each lane's registers.
// Included inside namespace fivedp.

inline void copy_async_16(void* to, const void* from, int n) {
    emulation::expect(
        reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0,
        "a copy of 16 bytes is not aligned to 16");
    std::memset(to, 0xff, 16);
    emulation::later([=] {
        std::memset(to, 0, 16);
        std::memcpy(to, from, static_cast<std::size_t>(n));
    });
}
inline void commit_copies() {
    emulation::commit();
}
template <int pending>
void wait_for_copies() {
    emulation::wait(pending);
}

namespace emulation {

struct LoadSlot {
    const char* row;
    std::uint32_t* to;
};

inline void load_matrices(std::uint32_t* to, const void* row, bool transposed) {
    LoadSlot slot{static_cast<const char*>(row), to};
    meet_warp(&slot, [transposed](void** slots) {
        for (int i = 0; i < 4; ++i) {
            std::uint16_t matrix[8][8];
            for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], static_cast<LoadSlot*>(slots[8 * i + r])->row, 16);
            for (int l = 0; l < 32; ++l) {
                const int group = l / 4, pair = l % 4;
                const std::uint32_t low = transposed ? matrix[2 * pair][group] : matrix[group][2 * pair];
                const std::uint32_t high = transposed ? matrix[2 * pair + 1][group] : matrix[group][2 * pair + 1];
                static_cast<LoadSlot*>(slots[l])->to[i] = low | high << 16;
            }
        }
    });
}

struct MultiplySlot {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
};

// `value(register, half)` reads one 16-bit factor.
template <class Value>
void multiply_16(float* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, const Value& value) {
    MultiplySlot slot{d, a, {b0, b1}};
    meet_warp(&slot, [&value](void** slots) {
        float left[16][16], right[16][8];
        for (int l = 0; l < 32; ++l) {
            const MultiplySlot& one = *static_cast<MultiplySlot*>(slots[l]);
            const int group = l / 4, pair = l % 4;
            for (int i = 0; i < 4; ++i)
                for (int half = 0; half < 2; ++half)
                    left[group + 8 * (i % 2)][2 * pair + half + 8 * (i / 2)] = value(one.a[i], half);
            for (int i = 0; i < 2; ++i)
                for (int half = 0; half < 2; ++half) right[2 * pair + half + 8 * i][group] = value(one.b[i], half);
        }
        for (int l = 0; l < 32; ++l) {
            const int group = l / 4, pair = l % 4;
            float* const to = static_cast<MultiplySlot*>(slots[l])->d;
            for (int i = 0; i < 4; ++i) {
                double sum = to[i];
                for (int k = 0; k < 16; ++k)
                    sum += static_cast<double>(left[group + 8 * (i / 2)][k]) * right[k][2 * pair + i % 2];
                to[i] = static_cast<float>(sum);
            }
        }
    });
}

}  // namespace emulation

inline void warp_load_matrices(std::uint32_t (&to)[4], const void* row) {
    emulation::load_matrices(to, row, false);
}
inline void warp_load_transposed(std::uint32_t (&to)[4], const void* row) {
    emulation::load_matrices(to, row, true);
}
inline void warp_load_either(std::uint32_t (&to)[4], const void* row, bool transposed) {
    emulation::load_matrices(to, row, transposed);
}

template <class T>
void warp_multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    emulation::multiply_16(d, a, b0, b1, [](std::uint32_t pair, int half) {
        return to_float(T{static_cast<std::uint16_t>(pair >> (16 * half))});
    });
}

inline std::uint32_t as_tf32(float value) {
    if (!std::isfinite(value)) return float_as_bits(value);
    return (float_as_bits(value) + 0x1000) & 0xffffe000u;
}
inline void warp_multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    emulation::MultiplySlot slot{d, a, {b0, b1}};
    emulation::meet_warp(&slot, [](void** slots) {
        // The instruction reads the upper 19 bits of a factor.
        const auto value = [](std::uint32_t bits) { return bits_as_float(bits & 0xffffe000u); };
        float left[16][8], right[8][8];
        for (int l = 0; l < 32; ++l) {
            const emulation::MultiplySlot& one = *static_cast<emulation::MultiplySlot*>(slots[l]);
            const int group = l / 4, pair = l % 4;
            for (int i = 0; i < 4; ++i) left[group + 8 * (i % 2)][pair + 4 * (i / 2)] = value(one.a[i]);
            for (int i = 0; i < 2; ++i) right[pair + 4 * i][group] = value(one.b[i]);
        }
        for (int l = 0; l < 32; ++l) {
            const int group = l / 4, pair = l % 4;
            float* const to = static_cast<emulation::MultiplySlot*>(slots[l])->d;
            for (int i = 0; i < 4; ++i) {
                double sum = to[i];
                for (int k = 0; k < 8; ++k)
                    sum += static_cast<double>(left[group + 8 * (i / 2)][k]) * right[k][2 * pair + i % 2];
                to[i] = static_cast<float>(sum);
            }
        }
    });
}

inline void warp_multiply_f64(double& d0, double& d1, double a, double b) {
    struct Slot {
        double *d0, *d1;
        double a, b;
    } slot{&d0, &d1, a, b};
    emulation::meet_warp(&slot, [](void** slots) {
        double left[8][4], right[4][8];
        for (int l = 0; l < 32; ++l) {
            left[l / 4][l % 4] = static_cast<Slot*>(slots[l])->a;
            right[l % 4][l / 4] = static_cast<Slot*>(slots[l])->b;
        }
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 2; ++i) {
                double& sum = i == 0 ? *static_cast<Slot*>(slots[l])->d0 : *static_cast<Slot*>(slots[l])->d1;
                for (int k = 0; k < 4; ++k) sum = std::fma(left[l / 4][k], right[k][2 * (l % 4) + i], sum);
            }
    });
}
