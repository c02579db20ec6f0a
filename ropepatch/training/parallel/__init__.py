"""Several processes: a sequence split over them, weights sharded over them."""
