// Argument errors: one sentence that says which argument, what came and what would be right.
// pybind11 turns std::invalid_argument into ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fivedp {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
    if (!holds) fail(parts...);
}

}  // namespace fivedp
