"""Speed of the layers against torch.nn and other peers, with the roofs of the machine beside them."""
