"""The page: a library of LoRAs, training of gates in the background, pictures with scores."""
