#define LEVEL avx512
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#define TILE_VECTORS 2
#include "contrastive/tiles_level.h"
