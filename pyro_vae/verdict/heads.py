"""What the columns of a verdict are called where a person reads them."""

HEADS = {
    "log_evidence": ("log p(x)", "nats"),
    "log_evidence_se": ("error", "of log p(x), nats"),
    "elbo": ("ELBO", "nats"),
    "kl": ("KL", "KL(q‖p(z|x)) = log p(x) − ELBO, nats"),
    "kl_se": ("±", "standard error of KL, nats"),
    "approximation": ("family", "what the guide's family costs, nats"),
    "amortization": ("encoder", "what its encoder costs, nats"),
    "khat": ("k-hat", "Pareto index of the importance weights; above 0.7 their tail is too heavy"),
    "guide_mean_error": ("guide mean", "error in posterior sd, worst coordinate"),
    "guide_sd_error": ("guide sd", "relative error, worst coordinate"),
    "mcmc_mean_error": ("MCMC mean", "error in posterior sd, worst coordinate"),
    "mcmc_sd_error": ("MCMC sd", "relative error, worst coordinate"),
    "mcmc_mcse": ("± MCSE", "standard error that the chains admit to, posterior sd"),
    "rhat": ("R-hat", "of the chains; at most 1.01"),
    "ess": ("ESS", "effective draws of the chains"),
    "why": ("why not", "empty where the guide is trusted"),
    "mcmc_trouble": ("chains", "what is wrong with them"),
}
"""By column: a short head, and what it means."""
