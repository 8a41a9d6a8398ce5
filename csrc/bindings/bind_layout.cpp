// fivedp._cpu.SchedulePrices: the sums behind the planner of fivedp.layout.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "layout/schedule_prices.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

using Table = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;
using Sizes = std::vector<std::int64_t>;
using Items = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

std::vector<Cut> read_cuts(const Table& table) {
    if (table.ndim() < 2 || table.shape(table.ndim() - 1) != 3) {
        throw std::invalid_argument("SchedulePrices: a table of cuts must end in (parts, first, stop)");
    }
    std::vector<Cut> cuts(static_cast<std::size_t>(table.size() / 3));
    const std::int64_t* values = table.data();
    for (Cut& cut : cuts) {
        cut = {values[0], values[1], values[2]};
        if (cut.parts < 1) {
            throw std::invalid_argument("SchedulePrices: an index is cut into no parts");
        }
        values += 3;
    }
    return cuts;
}

std::vector<std::int64_t> read(const Table& table) {
    return {table.data(), table.data() + table.size()};
}

SchedulePrices make(const Table& needed, const Table& owned, const Sizes& slot_index, const Sizes& tensor_start,
                    const Table& nodes, const Table& total_nodes, std::int64_t replicas, const Table& slice_part,
                    const Table& messages) {
    if (needed.ndim() != 4 || tensor_start.size() != 3) {
        throw std::invalid_argument("SchedulePrices: needed must be (indices, candidates, ranks, 3)");
    }
    SchedulePrices prices;
    prices.n_indices = static_cast<std::size_t>(needed.shape(0));
    prices.n_candidates = static_cast<std::size_t>(needed.shape(1));
    prices.n_ranks = static_cast<std::size_t>(needed.shape(2));
    prices.needed = read_cuts(needed);
    prices.owned = read_cuts(owned);
    prices.slot_index.assign(slot_index.begin(), slot_index.end());
    for (std::size_t tensor = 0; tensor < 3; ++tensor) {
        prices.tensor_start[tensor] = static_cast<std::size_t>(tensor_start[tensor]);
    }
    prices.nodes = read(nodes);
    prices.total_nodes = read(total_nodes);
    prices.replicas = replicas;
    prices.slice_part = read(slice_part);
    prices.messages = read(messages);
    const std::size_t numbers = prices.n_candidates * prices.n_ranks;
    bool fits = prices.owned.size() == prices.n_slots() * prices.n_ranks && prices.nodes.size() == numbers &&
                prices.total_nodes.size() == prices.n_candidates && replicas >= 1 &&
                prices.tensor_start[2] < prices.n_slots() &&
                prices.slice_part.size() == prices.n_variants() * numbers &&
                prices.messages.size() == (1 + prices.n_variants()) * prices.n_candidates;
    for (const std::size_t index : prices.slot_index) {
        fits = fits && index < prices.n_indices;
    }
    if (!fits) {
        throw std::invalid_argument("SchedulePrices: the tables do not fit each other");
    }
    return prices;
}

SchedulePrices::Prices price(const SchedulePrices& self, const Sizes& sizes, const Items& items) {
    if (sizes.size() != self.n_indices) {
        throw std::invalid_argument("SchedulePrices: one size per index is needed");
    }
    const auto [a, b, c, partial, whole] = items;
    return self.price(sizes, {a, b, c, partial, whole});
}

}  // namespace

void bind_layout(py::module_& module) {
    py::class_<SchedulePrices>(module, "SchedulePrices")
        .def(py::init(&make))
        .def("price",
             [](const SchedulePrices& self, const Sizes& sizes, const Items& items) {
                 const SchedulePrices::Prices prices = price(self, sizes, items);
                 return std::make_pair(prices.moves, prices.result);
             })
        .def("cheapest", [](const SchedulePrices& self, const Sizes& sizes, const Items& items) {
            const SchedulePrices::Prices prices = price(self, sizes, items);
            const std::size_t number = self.cheapest(prices);
            const std::size_t candidate = number % self.n_candidates;
            return std::make_tuple(number, prices.moves[candidate], prices.moves[self.n_candidates + candidate],
                                   prices.result[number]);
        });
}

}  // namespace fivedp
