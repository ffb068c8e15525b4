// which copy of the code that is compiled once per instruction set (setup.py, simd.h) runs on this CPU.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace avfast {

// names of the sets that were compiled and that this CPU has, best first: "avx512", "avx512_newton", "avx2",
// "baseline". The second is the first with TV-L1's roots by multiply-adds: better on Intel's CPUs.
inline std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    found = {"avx512", "avx512_newton"};
    if (__builtin_cpu_is("intel")) std::swap(found[0], found[1]);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

template <class Table>
struct Tables {
  const Table *avx512, *avx512_newton, *avx2, *baseline;
};

// the one of the tables that `isa` names; where it is null, the one that the environment variable AVFAST_ISA names,
// else the best. Throws std::invalid_argument where this CPU or build has no such set.
template <class Table>
const Table& choose_isa(const char* isa, const Tables<Table>& tables) {
  static const std::vector<const char*> sets = instruction_sets();
  if (isa == nullptr) isa = std::getenv("AVFAST_ISA");
  const std::string_view wanted = isa == nullptr || *isa == '\0' ? sets[0] : isa;
  for (const std::string_view name : sets) {
    if (name != wanted) continue;
    if (name == "avx512") return *tables.avx512;
    if (name == "avx512_newton") return *tables.avx512_newton;
    return name == "avx2" ? *tables.avx2 : *tables.baseline;
  }
  std::string message = "AVFAST_ISA is '" + std::string(wanted) + "', expected one of ";
  for (const char* name : sets) message += std::string(name == sets[0] ? "" : ", ") + name;
  throw std::invalid_argument(message + " on this CPU");
}

// the tables of that name in every namespace that was compiled; `newton`: the namespace of the second.
#if defined(__x86_64__)
#define AVFAST_TABLES(name, newton) \
  {&avfast::avx512::name, &avfast::newton::name, &avfast::avx2::name, &avfast::baseline::name}
#else
#define AVFAST_TABLES(name, newton) \
  {&avfast::baseline::name, &avfast::baseline::name, &avfast::baseline::name, &avfast::baseline::name}
#endif

}  // namespace avfast
