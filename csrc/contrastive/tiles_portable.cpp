#define LEVEL portable
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#define TILE_VECTORS 2
#include "contrastive/tiles_level.h"
