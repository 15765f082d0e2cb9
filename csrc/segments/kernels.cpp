#include "segments/tile.h"

namespace maskformer_fast {
namespace MF_ISA {
namespace {

MF_INLINE Floats cost_of(Floats logit, Floats inverse_score) {
  return exp(-logit) * inverse_score + inverse_score;
}

int64_t count_owned(const TileScratch& scratch, const Tile& tile, float own_logit) {
  Ints count{};
  for (int v = 0; v < tile.vectors(); ++v) {
    const Ints real = inside(tile, v * kLanes);
    for (int r = 0; r < tile.rows; ++r) count -= (logit_at(scratch, tile, r, v * kLanes) >= own_logit) & real;
  }
  return sum(count);
}

// Makes one candidate the winner of the pixels where its cost is below that of all candidates before it. Returns the
// number of pixels that it owns.
template <bool kFirst>
int64_t update_winners(PanopticScratch& scratch, const Tile& tile, const Candidate& candidate, int32_t slot) {
  Ints owned{};
  const Ints slots = broadcast(slot);
  for (int v = 0; v < tile.vectors(); ++v) {
    const Ints real = inside(tile, v * kLanes);
    for (int r = 0; r < tile.rows; ++r) {
      const int at = r * kTileColumns + v * kLanes;
      const Floats logit = logit_at(scratch.tile, tile, r, v * kLanes);
      const Floats margin = logit - candidate.own_logit;
      const Floats cost = cost_of(logit, broadcast(candidate.inverse_score));
      owned -= (logit >= candidate.own_logit) & real;
      if (kFirst) {
        store(scratch.cost + at, cost);
        store(scratch.margin + at, margin);
        store(scratch.slot + at, slots);
      } else {
        const Floats least_cost = load(scratch.cost + at);
        const Ints wins = cost < least_cost;
        store(scratch.cost + at, select(wins, cost, least_cost));
        store(scratch.margin + at, select(wins, margin, load(scratch.margin + at)));
        store(scratch.slot + at, select(wins, slots, load_ints(scratch.slot + at)));
      }
    }
  }
  return sum(owned);
}

int64_t count_slot(const PanopticScratch& scratch, const Tile& tile, int32_t slot) {
  Ints count{};
  for (int v = 0; v < tile.vectors(); ++v) {
    const Ints real = inside(tile, v * kLanes);
    for (int r = 0; r < tile.rows; ++r) {
      count -= (load_ints(scratch.slot + r * kTileColumns + v * kLanes) == slot) & real;
    }
  }
  return sum(count);
}

// Computes the bounds of all candidates in a row of tiles: scratch.low and scratch.high.
void bound_candidates(const PanopticJob& job, int64_t image, int64_t tile_row, PanopticScratch& scratch) {
  const MaskLogits& logits = job.logits;
  for (int64_t s = 0; s < job.slot_counts[image]; ++s) {
    const int64_t query = job.candidates[image * job.slots + s].query;
    const float* map = logits.data + image * logits.batch_stride + query * logits.query_stride;
    bound_columns(logits, map, tile_row, scratch.column_low, scratch.column_high);
    for (int64_t t = 0; t < logits.horizontal.tiles; ++t) {
      const Bounds b = bound_tile(logits, t, scratch.column_low, scratch.column_high);
      scratch.low[t * scratch.padded_slots + s] = b.low;
      scratch.high[t * scratch.padded_slots + s] = b.high;
    }
  }
}

// Writes the slots that may win somewhere in a tile, ascending, to scratch.possible. Returns their number.
int64_t find_possible(const Candidate* candidates, int64_t slots, const float* low, const float* high,
                      PanopticScratch& scratch) {
  float threshold = __builtin_huge_valf();  // the least upper bound of a cost
  for (int64_t s = 0; s < slots; ++s) scratch.most_cost[s] = candidates[s].inverse_score;
  for (int64_t s = 0; s < slots; s += kLanes) {
    const Floats inverse_score = load(scratch.most_cost + s);
    store(scratch.least_cost + s, cost_of(load(high + s), inverse_score));
    store(scratch.most_cost + s, cost_of(load(low + s), inverse_score));
  }
  for (int64_t s = 0; s < slots; ++s) threshold = scratch.most_cost[s] < threshold ? scratch.most_cost[s] : threshold;
  threshold *= 1 + 4e-6f;  // more than any rounding error
  int64_t count = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (scratch.least_cost[s] <= threshold) scratch.possible[count++] = static_cast<int32_t>(s);
  }
  return count;
}

void find_tile_winners(const PanopticJob& job, int64_t image, int64_t tile_row, int64_t tile_column,
                       PanopticScratch& scratch) {
  const MaskLogits& logits = job.logits;
  const Tile tile(logits, tile_row, tile_column);
  const int64_t slots = job.slot_counts[image];
  const int32_t no_query = static_cast<int32_t>(job.slots);
  const Candidate* candidates = job.candidates + image * job.slots;
  SlotCounts* counts = scratch.counts + image * job.slots;
  const auto expand = [&](int64_t slot) {
    const float* map = logits.data + image * logits.batch_stride + candidates[slot].query * logits.query_stride;
    read_taps(logits, map, tile_row, tile_column, scratch.tile);
    expand_rows(logits, tile_row, tile_column, scratch.tile);
  };

  const float* low = scratch.low + tile_column * scratch.padded_slots;
  const float* high = scratch.high + tile_column * scratch.padded_slots;
  const int64_t possible = find_possible(candidates, slots, low, high, scratch);
  const int32_t leader = scratch.possible[0];
  const bool leader_owns = low[leader] >= candidates[leader].own_logit;
  const bool leader_owns_nothing = high[leader] < candidates[leader].own_logit;
  const bool uniform = possible == 1 && (!job.intersect || leader_owns || leader_owns_nothing);
  for (int64_t s = 0, next = 0; s < slots; ++s) {
    const bool may_win = !uniform && next < possible && scratch.possible[next] == s;
    if (may_win) {
      expand(s);
      const auto update = next == 0 ? update_winners<true> : update_winners<false>;
      counts[s].owned += update(scratch, tile, candidates[s], static_cast<int32_t>(s));
      ++next;
    } else if (low[s] >= candidates[s].own_logit) {
      counts[s].owned += tile.pixels();
    } else if (high[s] >= candidates[s].own_logit) {
      expand(s);
      counts[s].owned += count_owned(scratch.tile, tile, candidates[s].own_logit);
    }
  }

  const int64_t row_index = image * logits.vertical.tiles + tile_row;
  int32_t& tile_slot = job.tile_slot[row_index * logits.horizontal.tiles + tile_column];
  if (uniform) {
    counts[leader].won += tile.pixels();
    if (!job.intersect || leader_owns) counts[leader].both += tile.pixels();
    tile_slot = job.intersect && leader_owns_nothing ? no_query : leader;
    return;
  }
  tile_slot = kMixedTile;
  for (int64_t k = 0; k < possible; ++k) {
    counts[scratch.possible[k]].won += count_slot(scratch, tile, scratch.possible[k]);
  }
  if (job.intersect) {
    for (int at = 0; at < tile.rows * kTileColumns; at += kLanes) {
      const Ints owns = load(scratch.margin + at) >= 0.0f;
      store(scratch.slot + at, select(owns, load_ints(scratch.slot + at), broadcast(no_query)));
    }
  }
  for (int64_t k = 0; k < possible; ++k) {
    counts[scratch.possible[k]].both += count_slot(scratch, tile, scratch.possible[k]);
  }
  for (int r = 0; r < tile.rows; ++r) {
    int32_t* out = job.id_map + (image * logits.vertical.size + tile.top + r) * logits.horizontal.size + tile.left;
    __builtin_memcpy(out, scratch.slot + r * kTileColumns, sizeof(int32_t) * tile.columns);
  }
}

}  // namespace

void find_winners(const PanopticJob& job, int64_t image, int64_t tile_row, PanopticScratch& scratch) {
  bound_candidates(job, image, tile_row, scratch);
  for (int64_t t = 0; t < job.logits.horizontal.tiles; ++t) find_tile_winners(job, image, tile_row, t, scratch);
}

void write_segments(const PanopticJob& job, int64_t image, int64_t tile_row) {
  const MaskLogits& logits = job.logits;
  const int32_t* ids = job.ids + image * (job.slots + 1);
  const int32_t* tile_slots = job.tile_slot + (image * logits.vertical.tiles + tile_row) * logits.horizontal.tiles;
  for (int64_t t = 0; t < logits.horizontal.tiles; ++t) {
    const Tile tile(logits, tile_row, t);
    for (int r = 0; r < tile.rows; ++r) {
      int32_t* out = job.id_map + (image * logits.vertical.size + tile.top + r) * logits.horizontal.size + tile.left;
      if (tile_slots[t] == kMixedTile) {
        for (int c = 0; c < tile.columns; ++c) out[c] = ids[out[c]];
      } else {
        const int32_t id = ids[tile_slots[t]];
        for (int c = 0; c < tile.columns; ++c) out[c] = id;
      }
    }
  }
}

void extract_mask(const InstanceJob& job, int64_t image, int64_t query, InstanceScratch& scratch) {
  const MaskLogits& logits = job.logits;
  const int64_t index = image * logits.queries + query, height = logits.vertical.size, width = logits.horizontal.size;
  const int64_t row_bytes = (width + 7) / 8;
  const float* map = logits.data + image * logits.batch_stride + query * logits.query_stride;
  uint8_t* mask = job.masks + index * height * row_bytes;
  __builtin_memset(mask, 0, height * row_bytes);
  int64_t area = 0, x0 = width, y0 = height, x1 = 0, y1 = 0;
  double total = 0;
  for (int64_t tile_row = 0; tile_row < logits.vertical.tiles; ++tile_row) {
    bound_columns(logits, map, tile_row, scratch.column_low, scratch.column_high);
    for (int64_t tile_column = 0; tile_column < logits.horizontal.tiles; ++tile_column) {
      if (!(bound_tile(logits, tile_column, scratch.column_low, scratch.column_high).high > 0)) continue;
      read_taps(logits, map, tile_row, tile_column, scratch.tile);
      expand_rows(logits, tile_row, tile_column, scratch.tile);
      const Tile tile(logits, tile_row, tile_column);
      const int64_t first_byte = tile.left / 8, bytes = least(kTileColumns / 8, row_bytes - first_byte);
      Floats sums{};
      uint64_t columns = 0;
      for (int r = 0; r < tile.rows; ++r) {
        uint64_t word = 0;
        Floats row_sums{};  // a sum for each row, as rounding errors grow with the number of terms
        for (int v = 0; v < tile.vectors(); ++v) {
          const Floats logit = logit_at(scratch.tile, tile, r, v * kLanes);
          const Ints in = (logit > 0.0f) & inside(tile, v * kLanes);
          const uint64_t bits = lane_bits(in);
          if (bits == 0) continue;
          word |= bits << (v * kLanes);
          row_sums += select(in, sigmoid(logit), Floats{});
        }
        if (word == 0) continue;
        sums += row_sums;
        columns |= word;
        area += __builtin_popcountll(word);
        y0 = least(y0, tile.top + r);
        y1 = tile.top + r + 1 > y1 ? tile.top + r + 1 : y1;
        for (int64_t b = 0; b < bytes; ++b) {  // byte by byte, whatever the machine's byte order
          mask[(tile.top + r) * row_bytes + first_byte + b] = static_cast<uint8_t>(word >> (8 * b));
        }
      }
      if (columns == 0) continue;
      x0 = least(x0, tile.left + __builtin_ctzll(columns));
      const int64_t end = tile.left + 64 - __builtin_clzll(columns);
      x1 = end > x1 ? end : x1;
      total += sum(sums);
    }
  }
  job.areas[index] = area;
  job.scores[index] = static_cast<float>(total / (static_cast<double>(area) + 1e-6));
  const int64_t box[4] = {x0, y0, x1, y1};
  for (int k = 0; k < 4; ++k) job.boxes[4 * index + k] = area > 0 ? static_cast<float>(box[k]) : 0.0f;
}

}  // namespace MF_ISA
}  // namespace maskformer_fast
