// Which teams may be the quickest for a problem, for callers who try some.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

struct Team {
  int least, most;  // threads
  int row_groups;   // into how many the batch is cut; 0: as the model has it
};

constexpr int kTeams = 6;
// So much of the time of the model's choice, as it estimates it, is a team worth trying that may take; one of as many threads, whose time
// the model knows better, and one of others, where a step takes so many nanoseconds at most.
constexpr double kWorthCutting = 1.1, kWorthTrying = 2.2, kShortStep = 50e3;

// The model's choice first, then others. For it errs where steps are short and cores are not those that it was fitted to, or where the
// machine moves them: two that share no cache and halve a batch have been a third slower than one, and two that share the units, of which
// each waits for what the other wrote, up to a sixth slower than two that share the batch.
inline int teams(const Machine& m, const CellInfo& cell, Problem p, bool training, Team (&found)[kTeams]) {
  const int threads = p.threads < 1 ? 1 : p.threads;
  Schedule forward[kTeams], backward[kTeams];
  int count = 0;
  const auto consider = [&](const Team& team, double worth) {
    p.least = team.least, p.threads = team.most, p.row_groups = team.row_groups;
    const Schedule f = plan(m, cell, p, false), b = training ? plan(m, cell, p, true) : Schedule();
    for (int i = 0; i < count; ++i)
      if (forward[i].same_team(f) && backward[i].same_team(b)) return;
    if (count == kTeams || (count && f.ns + b.ns > worth * (forward[0].ns + backward[0].ns))) return;
    forward[count] = f, backward[count] = b, found[count++] = team;
  };
  consider({1, threads, 0}, 1);
  const int chosen = forward[0].threads();
  if (chosen > 1 && (!training || chosen == backward[0].threads())) {
    if (p.batch >= chosen) consider({chosen, chosen, chosen}, kWorthCutting);
    consider({chosen, chosen, 1}, kWorthCutting);
  }
  if (forward[0].ns + backward[0].ns > kShortStep * double(p.steps)) return count;
  for (int least = 1, most = 1; least <= threads; least = most + 1, most *= 2)
    consider({least, most < threads ? most : threads, 0}, kWorthTrying);
  return count;
}

}  // namespace rnnkernels
