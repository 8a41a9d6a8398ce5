#include "cuda/hopper.cuh"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fivedp {

std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - emulation::dynamic_memory) +
           emulation::shared_base;
}

namespace emulation {
namespace {

std::vector<char> for_products;  // shared memory as the copy engine and the tensor cores see it

struct Phases {
    int arrivals = 0, missing = 0;
    std::int64_t bytes = 0;
    int phase = 0;
    bool published = false;

    void settle() {
        if (missing > 0 || bytes != 0) return;
        missing = arrivals;
        ++phase;
    }
};
std::map<const void*, Phases> barriers;

struct Named {
    int come = 0, n = 0, round = 0;
};
Named named[16];

// The accumulators of a warpgroup while products add to them.
struct Sums {
    float* at[128];
    std::vector<float> values[128];
};

struct Product {
    ProductPart parts[128];
    std::uint32_t registers[128][4];  // of the left factor
    std::vector<float> a, b;          // (64, 16), (16, columns)
    std::shared_ptr<Sums> sums;
    bool done = false;
};

struct Thread {
    std::map<const float*, std::shared_ptr<Sums>> sums;
    std::vector<std::shared_ptr<Product>> open;
    std::deque<std::vector<std::shared_ptr<Product>>> groups;
    bool fenced = false, boxes_may_be_old = false;
};
Thread threads_of_block[1024];

struct Meeting {
    int come = 0, round = 0;
    ProductPart parts[128];
};
Meeting meetings[8];

int registers_of[8];  // a thread of each warpgroup

// A 16-bit element that the tensor cores read.
std::uint16_t element_at(std::uint64_t matrix, std::uint32_t offset) {
    std::uint32_t address = static_cast<std::uint32_t>(matrix & 0x3fff) << 4;
    address += offset;
    address ^= (address >> 7 & 7) << 4;
    const std::size_t place = address - shared_base;
    if (address < shared_base || place + 2 > for_products.size()) {
        expect(false, "a product reads outside of shared memory");
        return 0;
    }
    std::uint16_t bits;
    std::memcpy(&bits, &for_products[place], 2);
    return bits;
}

std::uint16_t matrix_element(std::uint64_t matrix, bool columns_of_k, std::uint32_t mn, std::uint32_t k) {
    expect(matrix >> 62 == 1 && (matrix >> 49 & 7) == 0, "a matrix is not described as swizzled by 128 bytes");
    const std::uint32_t panel = static_cast<std::uint32_t>(matrix >> 16 & 0x3fff) << 4;
    const std::uint32_t group = static_cast<std::uint32_t>(matrix >> 32 & 0x3fff) << 4;
    return element_at(matrix, columns_of_k ? mn / 64 * panel + mn % 64 * 2 + k / 8 * group + k % 8 * 128
                                           : mn / 8 * group + mn % 8 * 128 + k * 2);
}

void read_factors(const Product& product, std::vector<float>& a, std::vector<float>& b) {
    const ProductPart& part = product.parts[0];
    const std::uint32_t columns = static_cast<std::uint32_t>(part.columns);
    a.resize(64 * 16);
    b.resize(16 * columns);
    for (std::uint32_t row = 0; row < 64; ++row)
        for (std::uint32_t k = 0; k < 16; ++k) {
            std::uint16_t bits;
            if (part.a == nullptr) {
                bits = matrix_element(part.a_matrix, part.a_is_columns, row, k);
            } else {  // A of m16n8k16
                const std::uint32_t lane = row % 8 * 4 + k % 8 / 2, which = row / 8 % 2 + k / 8 * 2;
                bits = static_cast<std::uint16_t>(product.registers[row / 16 * 32 + lane][which] >> (16 * (k % 2)));
            }
            a[row * 16 + k] = part.value(bits);
        }
    for (std::uint32_t k = 0; k < 16; ++k)
        for (std::uint32_t column = 0; column < columns; ++column)
            b[k * columns + column] = part.value(matrix_element(part.b_matrix, part.b_is_columns, column, k));
}

bool same(const std::vector<float>& x, const std::vector<float>& y) {
    return std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

void check_factors(const Product& product) {
    std::vector<float> a, b;
    read_factors(product, a, b);
    expect(same(a, product.a) && same(b, product.b), "shared memory was written while a product read it");
}

void carry_out(Product& product) {
    if (product.done) return;
    product.done = true;
    const int columns = product.parts[0].columns;
    std::vector<double> row_sums(static_cast<std::size_t>(columns));
    for (int row = 0; row < 64; ++row) {
        std::fill(row_sums.begin(), row_sums.end(), 0.0);
        for (int k = 0; k < 16; ++k) {
            const double left = product.a[static_cast<std::size_t>(row * 16 + k)];
            const float* const right = &product.b[static_cast<std::size_t>(k * columns)];
            for (int column = 0; column < columns; ++column)
                row_sums[static_cast<std::size_t>(column)] += left * static_cast<double>(right[column]);
        }
        for (int column = 0; column < columns; ++column) {
            const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
            const int place = column / 8 * 4 + row / 8 % 2 * 2 + column % 2;
            float& sum = product.sums->values[thread][static_cast<std::size_t>(place)];
            sum = static_cast<float>((product.parts[0].add ? static_cast<double>(sum) : 0.0) +
                                     row_sums[static_cast<std::size_t>(column)]);
        }
    }
}

// All threads of a warpgroup have come.
void start(const ProductPart (&parts)[128], int first) {
    auto product = std::make_shared<Product>();
    std::copy(parts, parts + 128, product->parts);
    const ProductPart& one = parts[0];
    const auto& under_way = threads_of_block[first].sums;
    const auto found = under_way.find(one.sums);
    const bool chained = found != under_way.end();
    product->sums = chained ? found->second : std::make_shared<Sums>();
    for (int i = 0; i < 128; ++i) {
        Thread& thread = threads_of_block[first + i];
        const ProductPart& part = parts[i];
        expect(part.columns == one.columns && part.a_matrix == one.a_matrix && part.b_matrix == one.b_matrix &&
                   part.add == one.add && (part.a == nullptr) == (one.a == nullptr) &&
                   part.a_is_columns == one.a_is_columns && part.b_is_columns == one.b_is_columns,
               "threads of a warpgroup start different products together");
        expect(thread.fenced, "a product starts without wgmma.fence after registers could be written");
        if (part.a != nullptr) std::copy(part.a, part.a + 4, product->registers[i]);
        const std::size_t n = static_cast<std::size_t>(part.columns / 2);
        if (chained) {
            expect(product->sums->at[i] == part.sums && product->sums->values[i].size() == n,
                   "products that are under way share some of their accumulators");
        } else {
            product->sums->at[i] = part.sums;
            product->sums->values[i].assign(part.sums, part.sums + n);
            std::memset(part.sums, 0xff, n * sizeof(float));
            thread.sums[part.sums] = product->sums;
        }
        thread.open.push_back(product);
    }
    read_factors(*product, product->a, product->b);
}

}  // namespace

void begin_block(std::int64_t shared_bytes) {
    for_products.assign(static_cast<std::size_t>(shared_bytes), static_cast<char>(0xff));
    barriers.clear();
    std::fill(std::begin(named), std::end(named), Named{});
    std::fill(std::begin(registers_of), std::end(registers_of), 0);
    for (Meeting& meeting : meetings) meeting.come = 0;
    for (int i = 0; i < here.threads; ++i) threads_of_block[i] = Thread{};
}

void end_block() {
    for (const Named& one : named) expect(one.come == 0, "a block ends while threads have arrived at a named barrier");
    for (int i = 0; i < here.threads; ++i)
        expect(threads_of_block[i].groups.empty() && threads_of_block[i].open.empty(),
               "a block ends while products are under way");
}

void check_map(const BoxedTensor& tensor) {
    bool fits = reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0 && tensor.size >= 1 && tensor.rows >= 1 &&
                tensor.rows <= 256;
    for (int i = 0; i < 3; ++i)
        fits = fits && tensor.counts[i] >= 1 && tensor.counts[i] <= std::int64_t{1} << 32 && tensor.steps[i] > 0 &&
               tensor.steps[i] % 16 == 0 && tensor.steps[i] < std::int64_t{1} << 40;
    if (!fits) throw std::runtime_error("emulated GPU: the copy engine can't be told of such a tensor");
}

void copy_box(const BoxCopy& copy) {
    const BoxedTensor& tensor = *copy.tensor;
    const std::int64_t place = copy.to - dynamic_memory, bytes = tensor.rows * std::int64_t{128};
    const bool fits = shared_address(copy.to) % swizzle_bytes == 0 && place >= 0 &&
                      place + bytes <= static_cast<std::int64_t>(for_products.size());
    expect(fits, "a box of the copy engine does not fit into shared memory, or is not aligned");
    expect(!threads_of_block[here.thread].boxes_may_be_old,
           "a box may have been read before the flag that its thread has seen: show_to_boxes is missing");
    const auto found = barriers.find(copy.barrier);
    expect(found != barriers.end() && found->second.published, "a copy counts at a barrier that was not made known");
    if (!fits || found == barriers.end()) return;
    std::memset(copy.to, 0xff, static_cast<std::size_t>(bytes));
    std::memset(&for_products[static_cast<std::size_t>(place)], 0xff, static_cast<std::size_t>(bytes));
    const BoxedTensor described = tensor;  // a thread's copy of a kernel's parameter may be gone by then
    at_some_time([copy, described, place, bytes] {
        for (std::int64_t row = 0; row < described.rows; ++row)
            for (std::int64_t column = 0; column < 64; ++column) {
                const std::int64_t element = copy.at[0] + column, token = copy.at[1] + row;
                std::uint16_t value = 0;
                if (element >= 0 && element < described.size && token >= 0 && token < described.counts[0] &&
                    copy.at[2] >= 0 && copy.at[2] < described.counts[1] && copy.at[3] >= 0 &&
                    copy.at[3] < described.counts[2])
                    std::memcpy(&value,
                                static_cast<const char*>(described.data) + 2 * element + token * described.steps[0] +
                                    copy.at[2] * described.steps[1] + copy.at[3] * described.steps[2],
                                2);
                std::uint32_t address = shared_address(copy.to) + static_cast<std::uint32_t>(row * 128 + column * 2);
                address ^= (address >> 7 & 7) << 4;
                std::memcpy(dynamic_memory + (address - shared_base), &value, 2);
                std::memcpy(&for_products[address - shared_base], &value, 2);
            }
        Phases& phases = barriers[copy.barrier];
        phases.bytes -= bytes;
        phases.settle();
    });
}

void init_phases(void* barrier, int arrivals) {
    expect(barriers.count(barrier) == 0, "a barrier is initialised twice");
    Phases phases;
    phases.arrivals = phases.missing = arrivals;
    barriers[barrier] = phases;
}
void publish_phases() {
    for (auto& entry : barriers) entry.second.published = true;
}
void arrive_at(void* barrier, std::int64_t bytes) {
    const auto found = barriers.find(barrier);
    expect(found != barriers.end(), "a thread arrives at a barrier that was not initialised");
    if (found == barriers.end()) return;
    expect(found->second.missing > 0, "more threads arrive at a barrier than its phase waits for");
    found->second.bytes += bytes;
    --found->second.missing;
    found->second.settle();
}
void expect_at(void* barrier, std::int64_t bytes) {
    const auto found = barriers.find(barrier);
    expect(found != barriers.end() && found->second.missing > 0,
           "a thread expects bytes at a barrier that was not initialised, or whose phase has all its arrivals");
    if (found != barriers.end()) found->second.bytes += bytes;
}
void wait_at(void* barrier, int parity) {
    const auto found = barriers.find(barrier);
    expect(found != barriers.end(), "a thread waits at a barrier that was not initialised");
    if (found == barriers.end()) return;
    const Phases& phases = found->second;
    wait_until([&phases, parity] { return (phases.phase & 1) != parity; });
}
void publish_shared() {
    std::memcpy(for_products.data(), dynamic_memory, for_products.size());
}

void see_flag() {
    threads_of_block[here.thread].boxes_may_be_old = true;
}
void show_flags() {
    threads_of_block[here.thread].boxes_may_be_old = false;
}

void meet_some(int number, int n, bool waits) {
    Named& one = named[number & 15];
    expect(number >= 1 && number < 16 && n % 32 == 0 && (one.come == 0 || one.n == n),
           "a named barrier is used with two numbers of threads");
    one.n = n;
    const int round = one.round;
    if (++one.come == n) {
        one.come = 0;
        ++one.round;
    }
    if (waits) wait_until([&one, round] { return one.round != round; });
}

void start_part(const ProductPart& part) {
    const int group = here.thread / 128, place = here.thread % 128;
    Meeting& meeting = meetings[group];
    meeting.parts[place] = part;
    const int round = meeting.round;
    if (++meeting.come == 128) {
        meeting.come = 0;
        ++meeting.round;
        start(meeting.parts, 128 * group);
    } else {
        wait_until([&meeting, round] { return meeting.round != round; });
    }
}
void open_parts() {
    threads_of_block[here.thread].fenced = true;
}
void commit_parts() {
    Thread& me = threads_of_block[here.thread];
    me.groups.push_back(std::move(me.open));
    me.open.clear();
}
void wait_for_parts(int pending) {
    Thread& me = threads_of_block[here.thread];
    const int place = here.thread % 128;
    // Others may do what they should not do yet; now and then a warp is so late that another warpgroup could have gone
    // through a whole tile.
    const bool late = place % 32 == 0 && draw() % 16 == 0;
    for (std::uint64_t turns = draw() % (late ? 1024 : 8); turns > 0; --turns) pause();
    me.fenced = false;
    while (static_cast<int>(me.groups.size()) > pending) {
        for (const auto& product : me.groups.front()) {
            carry_out(*product);
            if (here.thread % 32 == 0) check_factors(*product);  // a warp's part may end later than another's
            const ProductPart& part = product->parts[place];
            expect(part.a == nullptr || std::equal(part.a, part.a + 4, product->registers[place]),
                   "a register was written while a product read it");
        }
        me.groups.pop_front();
    }
    // What no product under way adds to any more is there.
    for (auto entry = me.sums.begin(); entry != me.sums.end();) {
        const auto uses = [&](const std::vector<std::shared_ptr<Product>>& group) {
            return std::any_of(group.begin(), group.end(),
                               [&](const auto& product) { return product->sums == entry->second; });
        };
        if (uses(me.open) || std::any_of(me.groups.begin(), me.groups.end(), uses)) {
            ++entry;
            continue;
        }
        const std::vector<float>& values = entry->second->values[place];
        std::copy(values.begin(), values.end(), entry->second->at[place]);
        entry = me.sums.erase(entry);
    }
}

void change_registers(int n) {
    registers_of[here.thread / 128] = n;
    int all = 0;
    for (int group = 0; group < here.threads / 128; ++group) all += registers_of[group] * 128;
    expect(all <= 65536, "warpgroups ask for more registers than a multiprocessor has");
}

}  // namespace emulation
}  // namespace fivedp
