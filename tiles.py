from vae3d import is_out_of_memory, together
