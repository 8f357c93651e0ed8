"""Calls of every public function with arguments drawn at random, right ones and wrong ones."""
