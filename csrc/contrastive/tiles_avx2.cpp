#define LEVEL avx2
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define TILE_VECTORS 2
#include "contrastive/tiles_level.h"
