#include "cpu/dispatch.hpp"

#include <cstdlib>

#include "common/check.hpp"
#include "common/cpu_features.hpp"

namespace fivedp {

namespace generic {
extern const KernelTable table;
}
#ifdef FIVEDP_X86
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif
#ifdef FIVEDP_TEST_ISAS
namespace avx512_emulated {
extern const KernelTable table;
}
namespace avx512_bf16_emulated {
extern const KernelTable table;
}
#endif

namespace {

struct Choice {
    const KernelTable* table;
    bool supported, automatic;
};

std::vector<Choice> choices() {
    std::vector<Choice> all = {{&generic::table, true, true}};
#ifdef FIVEDP_X86
    const CpuFeatures& cpu = cpu_features();
    all.push_back({&avx2::table, cpu.avx2_fma, true});
    all.push_back({&avx512::table, cpu.avx512, true});
    all.push_back({&avx512_bf16::table, cpu.avx512_bf16, true});
#ifdef FIVEDP_TEST_ISAS
    all.push_back({&avx512_emulated::table, cpu.avx2_fma, false});
    all.push_back({&avx512_bf16_emulated::table, cpu.avx2_fma, false});
#endif
#endif
    return all;
}

const KernelTable& choose() {
    const char* wanted = std::getenv("FIVEDP_ISA");
    const KernelTable* best = nullptr;
    for (const Choice& choice : choices()) {
        if (!choice.supported) continue;
        if (wanted != nullptr && *wanted != '\0') {
            if (std::string(wanted) == choice.table->name) return *choice.table;
        } else if (choice.automatic) {
            best = choice.table;
        }
    }
    if (best != nullptr) return *best;
    std::string names;
    for (const std::string& name : supported_isas()) names += (names.empty() ? "" : ", ") + name;
    fail("FIVEDP_ISA is '", wanted, "', which this machine or build does not have; supported here: ", names);
}

}  // namespace

const KernelTable& kernels() {
    static const KernelTable& chosen = choose();
    return chosen;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Choice& choice : choices())
        if (choice.supported) names.emplace_back(choice.table->name);
    return names;
}

}  // namespace fivedp
