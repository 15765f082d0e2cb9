// Kernels of panoptic and instance inference, compiled once for each instruction set (common/cpu_isa.h).
//
// Low-resolution mask logits are resampled bilinearly (by the definition of maskformer_fast/ops/resample.py) in tiles
// of kTileRows x kTileColumns pixels. Bilinear values lie between the least and the largest of a tile's taps, so these
// bounds decide most tiles: one query has the least cost everywhere in the tile, or a mask covers all of the tile or
// none of it. The other tiles are computed pixel by pixel, and only for the queries that matter there.
//
// NaN counts as the least logit. Logits beyond +-kLargestLogit, infinite ones included, are clamped to it.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"

namespace maskformer_fast {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;  // one 64-bit word of a packed mask
constexpr int kTapSlack = 32;     // readable floats behind a row of taps: two of the widest vectors
constexpr float kLargestLogit = 1e30f;

// Taps of output positions along one axis, in tiles. Each tile has an ascending list of the map positions that it
// reads, in which the two taps of an output position are neighbours (the last row or column is there twice).
struct TiledAxis {
  int64_t size;           // output positions
  int64_t tiles;          // number of tiles; positions beyond `size` repeat the last one
  int tile;               // output positions of a tile
  const int32_t* left;    // [tiles * tile], the first tap, as an index into the tile's list
  const float* weight;    // [tiles * tile], share of the second tap
  const int32_t* taps;    // [tiles, 2 * tile], the lists
  const int32_t* counts;  // [tiles], lengths of the lists
  const int32_t* runs;    // [tiles], number of leading taps that are consecutive positions
};

struct MaskLogits {
  const float* data;  // [batch, queries, rows, columns], columns adjacent
  int64_t batch, queries;
  int64_t columns;                                 // of a map
  int64_t batch_stride, query_stride, row_stride;  // in floats
  TiledAxis vertical, horizontal;
};

// Logits of one query that one tile reads.
struct alignas(64) TileScratch {
  float taps[2 * kTileRows][2 * kTileColumns + kTapSlack];
  float rows[2 * kTileRows][kTileColumns];  // the taps resampled along the columns
};

// A query that takes part in panoptic inference. Its slot is its number among the candidates of the image.
struct Candidate {
  int64_t query;
  float inverse_score;
  float own_logit;  // least logit of the pixels that the query owns
};

// Pixels of a slot: won (its cost is the least), owned (its logit is at least own_logit), and both.
struct SlotCounts {
  int64_t won, owned, both;
};

// Scratch memory of one worker.
struct PanopticScratch {
  TileScratch tile;
  alignas(64) float cost[kTileRows * kTileColumns];      // least (1 + e^-logit) / score so far at each pixel
  alignas(64) float margin[kTileRows * kTileColumns];    // the winner's logit less its own_logit
  alignas(64) int32_t slot[kTileRows * kTileColumns];    // the winner
  float* column_low;   // [columns of a map], bounds of one candidate's logits in a row of tiles
  float* column_high;
  int64_t padded_slots;  // most candidates of an image, rounded up to a multiple of the widest vector
  float* low;            // [tiles across, padded_slots], bounds of each candidate's logits in a tile
  float* high;
  float* least_cost;  // [padded_slots], bounds of each candidate's cost in a tile
  float* most_cost;
  int32_t* possible;   // [padded_slots], slots that may win somewhere in the tile
  SlotCounts* counts;  // [batch, slots], sums over this worker's tiles
};

struct PanopticJob {
  MaskLogits logits;
  const Candidate* candidates;  // [batch, slots]
  const int64_t* slot_counts;   // [batch], candidates of an image
  int64_t slots;                // most candidates of an image
  bool intersect;               // a segment is the pixels that its query both won and owns
  int32_t* id_map;              // [batch, height, width], slots until write_segments replaces them
  int32_t* tile_slot;           // [batch, tiles down, tiles across], the slot of all pixels of a tile, or kMixedTile
  const int32_t* ids;           // [batch, slots + 1], segment of each slot; the last slot is of no query
};

constexpr int32_t kMixedTile = -1;

struct InstanceScratch {
  TileScratch tile;
  float* column_low;  // [columns of a map], bounds of the query's logits in a row of tiles
  float* column_high;
};

struct InstanceJob {
  MaskLogits logits;
  uint8_t* masks;  // [batch, queries, height, ceil(width / 8)]
  int64_t* areas;  // [batch, queries]
  float* boxes;    // [batch, queries, 4]
  float* scores;   // [batch, queries]
};

MF_DECLARE_KERNELS(
    // Finds the winners of the pixels in one row of tiles, writes their slots and counts pixels.
    void find_winners(const PanopticJob& job, int64_t image, int64_t tile_row, PanopticScratch& scratch);

    // Replaces slots by segment numbers in one row of tiles.
    void write_segments(const PanopticJob& job, int64_t image, int64_t tile_row);

    // Writes one query's mask with its area, box and score.
    void extract_mask(const InstanceJob& job, int64_t image, int64_t query, InstanceScratch& scratch);)

}  // namespace maskformer_fast
