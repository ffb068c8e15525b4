// which copy of the code that is compiled once per instruction set (setup.py, simd.h) runs on this CPU.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace avfast {

// names of the sets that were compiled and that this CPU has, best first: "avx512", "avx2", "baseline".
inline std::vector<const char*> instruction_sets() {
  std::vector<const char*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

// the one of three tables that `isa` names; the best where it is null. Throws where this CPU or build has no such set.
template <class Table>
const Table& choose_isa(const char* isa, const Table* avx512, const Table* avx2, const Table* baseline) {
  for (const char* found : instruction_sets()) {
    const std::string name = found;
    if (isa == nullptr || name == isa) return *(name == "avx512" ? avx512 : name == "avx2" ? avx2 : baseline);
  }
  throw std::invalid_argument(std::string("this CPU or this build has no ") + isa);
}

// &avx512::NAME, &avx2::NAME, &baseline::NAME, as far as they are compiled.
#if defined(__x86_64__)
#define AVFAST_TABLES(name) &avfast::avx512::name, &avfast::avx2::name, &avfast::baseline::name
#else
#define AVFAST_TABLES(name) &avfast::baseline::name, &avfast::baseline::name, &avfast::baseline::name
#endif

}  // namespace avfast
