#include "cuda/emulation/device.hpp"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fivedp {
namespace emulation {

Place here;
char* dynamic_memory = nullptr;

namespace {

constexpr std::size_t stack_bytes = 256 * 1024;

enum class State { ready, at_warp, at_block, waiting, gone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::ready;
    void* argument = nullptr;  // of the meeting it waits at
    const std::function<void(void**)>* work = nullptr;
    std::deque<std::vector<std::function<void()>>> groups;  // committed copies, oldest first
    std::vector<std::function<void()>> open;
    std::function<bool()> condition;  // what it waits for
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
int running = -1;
const std::function<void()>* body = nullptr;
std::mt19937_64 order(1);
std::vector<char> shared;
const char* broken = nullptr;  // what a kernel did that a GPU would not do
std::vector<std::function<void()>> some_time;

void leave() {
    swapcontext(&fibers[static_cast<std::size_t>(running)].context, &scheduler);
}

void enter() {
    (*body)();
    fibers[static_cast<std::size_t>(running)].state = State::gone;
    leave();
}

Fiber& me() {
    return fibers[static_cast<std::size_t>(running)];
}

void resume(int thread) {
    running = thread;
    here.thread = thread;
    swapcontext(&scheduler, &fibers[static_cast<std::size_t>(thread)].context);
    running = -1;
}

// Lets the threads of a warp go on for which all lanes have come to the same kind of meeting.
void hold_warp_meeting(int first) {
    void* arguments[32];
    for (int i = 0; i < 32; ++i) arguments[i] = fibers[static_cast<std::size_t>(first + i)].argument;
    (*fibers[static_cast<std::size_t>(first)].work)(arguments);
    for (int i = 0; i < 32; ++i) fibers[static_cast<std::size_t>(first + i)].state = State::ready;
}

int count(State state, int first, int n) {
    return static_cast<int>(std::count_if(fibers.begin() + first, fibers.begin() + first + n,
                                          [state](const Fiber& fiber) { return fiber.state == state; }));
}

void run_one_of_some_time() {
    const std::size_t which = order() % some_time.size();
    std::swap(some_time[which], some_time.back());
    const std::function<void()> work = std::move(some_time.back());
    some_time.pop_back();
    work();
}

void run_block(int n) {
    std::vector<int> warps(static_cast<std::size_t>(n / 32));
    for (std::size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
    for (;;) {
        bool moved = false;
        std::shuffle(warps.begin(), warps.end(), order);
        if (!some_time.empty() && order() % 4 == 0) run_one_of_some_time();
        for (const int w : warps) {
            // A warp runs on for some meetings, so that others fall far behind.
            for (int turn = 1 + static_cast<int>(order() % 16); turn > 0; --turn) {
                bool any = false;
                for (int i = 32 * w; i < 32 * w + 32; ++i) {
                    Fiber& fiber = fibers[static_cast<std::size_t>(i)];
                    if (fiber.state == State::waiting && fiber.condition()) fiber.state = State::ready;
                    if (fiber.state == State::ready) {
                        resume(i);
                        any = true;
                    }
                }
                moved |= any;
                if (count(State::at_warp, 32 * w, 32) == 32)
                    hold_warp_meeting(32 * w);
                else if (!any)
                    break;
            }
        }
        if (count(State::gone, 0, n) == n) return;
        if (count(State::at_block, 0, n) == n) {
            for (int i = 0; i < n; ++i) fibers[static_cast<std::size_t>(i)].state = State::ready;
            continue;
        }
        if (!moved && !some_time.empty()) {
            run_one_of_some_time();
        } else if (!moved) {
            const std::string first = broken != nullptr ? std::string(broken) + "; " : "";
            broken = nullptr;
            throw std::runtime_error("emulated GPU: " + first + std::to_string(count(State::at_block, 0, n)) +
                                     " threads of a block are at a barrier, " +
                                     std::to_string(count(State::at_warp, 0, n)) + " at a meeting of their warp, " +
                                     std::to_string(count(State::waiting, 0, n)) + " at a phase or a named barrier, " +
                                     std::to_string(count(State::gone, 0, n)) + " have left: they wait for ever");
        }
    }
}

}  // namespace

void meet_warp(void* argument, const std::function<void(void**)>& work) {
    me().argument = argument;
    me().work = &work;
    me().state = State::at_warp;
    leave();
}
void meet_block() {
    me().state = State::at_block;
    leave();
}
std::uint64_t draw() {
    return order();
}
void pause() {
    leave();
}
void wait_until(std::function<bool()> condition) {
    me().condition = std::move(condition);
    me().state = State::waiting;
    leave();
}
void at_some_time(std::function<void()> work) {
    some_time.push_back(std::move(work));
}
void later(std::function<void()> copy) {
    me().open.push_back(std::move(copy));
}
void commit() {
    me().groups.push_back(std::move(me().open));
    me().open.clear();
}
void wait(int pending) {
    while (static_cast<int>(me().groups.size()) > pending) {
        for (const auto& copy : me().groups.front()) copy();
        me().groups.pop_front();
    }
}
void expect(bool holds, const char* what) {
    if (!holds && broken == nullptr) broken = what;
}
void set_seed(std::uint64_t seed) {
    order.seed(seed);
}

void run_grid(std::int64_t x, std::int64_t y, std::int64_t z, int n, std::int64_t shared_bytes,
              const std::function<void()>& kernel) {
    if (n < 1 || n % 32 != 0 || n > 1024)
        throw std::runtime_error("emulated GPU: a block has a multiple of 32 threads");
    if (shared_bytes > 227 * 1024) throw std::runtime_error("emulated GPU: more shared memory than a block can have");
    if (static_cast<int>(fibers.size()) < n) fibers.resize(static_cast<std::size_t>(n));
    shared.resize(static_cast<std::size_t>(shared_bytes) + 128);
    dynamic_memory = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(shared.data()) + 127) / 128 * 128);
    here.threads = n;
    here.blocks[0] = x, here.blocks[1] = y, here.blocks[2] = z;
    body = &kernel;
    for (std::int64_t block = 0; block < x * y * z; ++block) {
        here.block[0] = block % x, here.block[1] = block / x % y, here.block[2] = block / (x * y);
        std::memset(dynamic_memory, 0xff, static_cast<std::size_t>(shared_bytes));
        some_time.clear();
        begin_block(shared_bytes);
        for (int i = 0; i < n; ++i) {
            Fiber& fiber = fibers[static_cast<std::size_t>(i)];
            if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
            fiber.state = State::ready;
            fiber.groups.clear();
            fiber.open.clear();
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = stack_bytes;
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, enter, 0);
        }
        run_block(n);
        expect(some_time.empty(), "a block ends while copies to its shared memory are under way");
        end_block();
        if (broken != nullptr) {
            const std::string what = broken;
            broken = nullptr;
            throw std::runtime_error("emulated GPU: " + what);
        }
    }
}

}  // namespace emulation

float half_bits_as_float(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? bits_as_float(0x7fc00000u) : sign * bits_as_float(0x7f800000u);
    return sign * (exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                            : std::ldexp(static_cast<float>(mantissa), -24));
}

std::uint16_t float_as_half_bits(float value) {
    const std::uint16_t sign = static_cast<std::uint16_t>(float_as_bits(value) >> 16 & 0x8000);
    if (value != value) return 0x7fff;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
    int exponent = -24;  // where size is 0
    if (size > 0) std::frexp(size, &exponent);
    const int place = std::max(exponent - 11, -24);  // of the last bit
    // nearbyint rounds ties to even; a carry moves into the exponent by itself.
    const int whole = static_cast<int>(std::nearbyint(std::ldexp(size, -place)));
    return static_cast<std::uint16_t>(sign | (whole + ((place + 24) << 10)));
}

}  // namespace fivedp
