"""The server's part of a round: who takes part, what is asked, what comes back, what is saved."""
