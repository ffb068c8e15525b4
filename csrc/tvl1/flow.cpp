#include "flow.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/isa.h"
#include "../common/threads.h"
#include "workspace.h"

namespace avfast::tvl1 {
namespace {

// The rows of one pair are shared out from this many pixels on. In a smaller pair the threads would lose more time by
// waiting for each other than they gain.
constexpr int64_t kTeamArea = 160 * 120;
constexpr int kTeamRows = 32;

}  // namespace

template <class Grey>
void flow(const Grey* a, const Grey* b, float* flow, int64_t pairs, int height, int width, const Params& params,
          int threads) {
  const Kernels& kernels = choose_isa(AVFAST_TABLES(kTvl1));
  if (pairs == 0 || height == 0 || width == 0) return;
  const Size size{height, width};
  const int64_t area = static_cast<int64_t>(height) * width;
  const bool divisible = params.epsilon <= 0.0f && area >= kTeamArea;
  const int64_t max_workers = divisible ? pairs * std::max(1, height / kTeamRows) : pairs;
  const int workers = static_cast<int>(std::clamp<int64_t>(threads, 1, max_workers));

  std::vector<std::unique_ptr<Workspace>> workspaces;
  for (int64_t i = 0; i < std::min<int64_t>(workers, pairs); ++i) {
    workspaces.push_back(std::make_unique<Workspace>(size, params, kernels));
  }
  std::vector<Buffer> scratch;
  std::vector<std::unique_ptr<Team>> singles;
  for (int i = 0; i < workers; ++i) {
    scratch.emplace_back(scratch_size(size));
    singles.push_back(std::make_unique<Team>(1));
  }
  const auto solve = [&](int64_t pair, Workspace& workspace, Member me) {
    workspace.solve(a + pair * area, b + pair * area, flow + pair * 2 * area, me);
  };

  // first whole pairs, as long as there is one for every thread; then teams of threads solve the pairs that are left
  std::atomic<int64_t> next{0};
  std::vector<std::unique_ptr<Team>> teams;
  std::once_flag made;
  run_threads(workers, [&](int rank, int total) {
    const int64_t left = divisible ? pairs % total : 0;
    const int64_t whole = pairs - left;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < whole;) {
      solve(i, *workspaces[rank], {*singles[rank], 0, scratch[rank].get()});
    }
    if (left == 0) return;
    const int members = static_cast<int>(total / left);
    const int team = rank / members;
    if (team >= left) return;
    std::call_once(made, [&] {
      for (int64_t i = 0; i < left; ++i) teams.push_back(std::make_unique<Team>(members));
    });
    // of the team's first member; where no whole pair was solved there are only as many workspaces as teams
    Workspace& workspace = *workspaces[whole > 0 ? team * members : team];
    solve(whole + team, workspace, {*teams[team], rank % members, scratch[rank].get()});
  });
}

template void flow(const float*, const float*, float*, int64_t, int, int, const Params&, int);
template void flow(const uint8_t*, const uint8_t*, float*, int64_t, int, int, const Params&, int);

}  // namespace avfast::tvl1
