// The functions of cuda/hopper.cuh for the emulation: what the PTX manual says of them. Included inside namespace
// fivedp.
//
// Shared memory is kept twice: as threads see it, and as the copy engine and the tensor cores do. Boxes go to both;
// what threads write goes to the other one when a thread calls publish_to_products. Boxes arrive at a random time and
// are NaN in between. A product reads its factors when it starts and again when it is waited for: it is an error if
// they have changed. Its accumulators are NaN until then. A thread that has read a flag may start no box before
// show_to_boxes.

namespace emulation {

// Where the block's dynamic shared memory begins among shared addresses: a multiple of 128, as on a GPU, of no more.
constexpr std::uint32_t shared_base = 1152;

// `to` gets the box when the time has come.
struct BoxCopy {
    char* to;
    const BoxedTensor* tensor;
    std::int64_t at[4];  // element, token, head, sequence
    void* barrier;
};
void check_map(const BoxedTensor& tensor);
void copy_box(const BoxCopy& copy);
void init_phases(void* barrier, int arrivals);
void publish_phases();
void arrive_at(void* barrier, std::int64_t bytes);
void expect_at(void* barrier, std::int64_t bytes);
void wait_at(void* barrier, int parity);
void publish_shared();
void show_flags();
void meet_some(int number, int n, bool waits);

// One thread's part of a product that all threads of its warpgroup start together.
struct ProductPart {
    float* sums;             // (columns / 8, 4)
    const std::uint32_t* a;  // 4 registers; null: the matrix
    std::uint64_t a_matrix, b_matrix;
    int columns;
    bool a_is_columns, b_is_columns, add;
    float (*value)(std::uint16_t);
};
void start_part(const ProductPart& part);
void open_parts();
void commit_parts();
void wait_for_parts(int pending);
void change_registers(int n);

template <class T>
float value_of(std::uint16_t bits) {
    return to_float(T{bits});
}

}  // namespace emulation

#define FIVEDP_GRID_CONSTANT

struct alignas(8) Barrier {
    std::uint64_t bits;
};

inline void init_barrier(Barrier* barrier, int arrivals) {
    emulation::init_phases(barrier, arrivals);
}
inline void publish_barriers() {
    emulation::publish_phases();
}
inline void arrive(Barrier* barrier) {
    emulation::arrive_at(barrier, 0);
}
inline void arrive_expecting(Barrier* barrier, int bytes) {
    emulation::arrive_at(barrier, bytes);
}
inline void expect_bytes(Barrier* barrier, int bytes) {
    emulation::expect_at(barrier, bytes);
}
inline void wait_for_phase(Barrier* barrier, int parity) {
    emulation::wait_at(barrier, parity);
}

inline void trap() {
    emulation::expect(false, "a kernel ended with a trap");
}
template <class Kernel>
bool built_for_hopper(Kernel) {
    return true;
}

using TensorMap = BoxedTensor;
inline TensorMap tensor_map(const BoxedTensor& tensor) {
    emulation::check_map(tensor);
    return tensor;
}
inline void copy_box(void* to, const TensorMap* map, Barrier* barrier, int element, int token, int head, int batch) {
    emulation::copy_box({static_cast<char*>(to), map, {element, token, head, batch}, barrier});
}
inline void publish_to_products() {
    emulation::publish_shared();
}

inline void show_to_boxes() {
    emulation::show_flags();
}

inline void sync_some(int number, int n) {
    emulation::meet_some(number, n, true);
}
inline void arrive_some(int number, int n) {
    emulation::meet_some(number, n, false);
}

template <int n>
void raise_registers() {
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    emulation::change_registers(n);
}
template <int n>
void lower_registers() {
    static_assert(n >= 24 && n <= 256 && n % 8 == 0);
    emulation::change_registers(n);
}

inline void open_products() {
    emulation::open_parts();
}
inline void commit_products() {
    emulation::commit_parts();
}
template <int pending>
void wait_for_products() {
    emulation::wait_for_parts(pending);
}
template <int n>
void settle(float (&)[n][4]) {}
template <int n>
void settle(std::uint32_t (&)[n][4]) {}

template <bool a_columns = false, bool b_columns = false, class T, int n>
void start_product(T, float (&d)[n][4], std::uint64_t a, std::uint64_t b, bool add) {
    emulation::start_part({d[0], nullptr, a, b, 8 * n, a_columns, b_columns, add, emulation::value_of<T>});
}
template <class T, int n>
void start_product(T, float (&d)[n][4], const std::uint32_t (&a)[4], std::uint64_t b) {
    emulation::start_part({d[0], a, 0, b, 8 * n, false, true, true, emulation::value_of<T>});
}
template <class T, int n>
void start_product(T, float (&d)[n][4], std::uint64_t a, std::uint64_t b) {
    start_product<false, true>(T{}, d, a, b, true);
}
